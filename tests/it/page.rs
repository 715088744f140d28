//! Job: the status page as a person sees it: in a real browser, before two running sidecars.
//! Input: a pair; Debian's chromium, driven by chromedriver (W3C WebDriver). Output: passes or fails; screenshots under `target/page/`.
//! Always true: what is judged stands on the page, and is compared with what the sidecar says elsewhere; the browser's console is empty at the end.

use crate::bed::pair::{LINK, ORIGIN_REGION, Pair, PairOptions};
use crate::bed::ports::free_port;
use crate::bed::process::Process;
use crate::bed::sidecar::{Sidecar, link_of};
use crate::bed::{PATIENCE, until};
use crate::verify::{assert_verified, over_app};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use etcd_ferry::certs::load::load_identity;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// From the cut of a link until both sides' pages show it, by the clock on the wall: what an operator is promised.
const CUT_SHOWN_MAX: Duration = Duration::from_secs(3);

/// Far more than a link that follows has, in seconds.
const LAG_SHOWN_MIN: f64 = 2.0;

/// One browser with one window.
struct Browser {
    port: u16,
    session: String,
    _driver: Process,
}

impl Browser {
    async fn start(dir: &Path, dark: bool) -> Self {
        let dir = dir.join(if dark { "dark" } else { "light" });
        std::fs::create_dir(&dir).unwrap();
        let port = free_port();
        let mut command = Command::new("chromedriver");
        command.arg(format!("--port={port}")).env("TMPDIR", &dir).env("HOME", &dir);
        let driver = Process::start("chromedriver", &mut command, &dir.join("chromedriver.log"));
        until("chromedriver (`.ci/install --tests` brings it)", PATIENCE, async || {
            call(port, "GET", "/status", &Value::Null).await.filter(|status| status["ready"] == true)
        })
        .await;
        let mut arguments = vec!["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"];
        arguments.extend(dark.then_some("--force-dark-mode"));
        let options = json!({ "args": arguments, "binary": "/usr/bin/chromium" });
        let wanted = json!({ "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" } });
        let session = call(port, "POST", "/session", &json!({ "capabilities": { "alwaysMatch": wanted } })).await;
        let session =
            session.and_then(|s| s["sessionId"].as_str().map(str::to_owned)).expect("a session of the browser");
        Self { port, session, _driver: driver }
    }

    async fn ask(&self, method: &str, path: &str, body: Value) -> Value {
        let path = format!("/session/{}{path}", self.session);
        call(self.port, method, &path, &body).await.unwrap_or_else(|| panic!("the browser does not answer {path}"))
    }

    async fn open(&self, sidecar: &Sidecar) {
        self.ask("POST", "/url", json!({ "url": format!("http://{}/", sidecar.options.ports.http) })).await;
    }

    async fn size(&self, width: u32, height: u32) {
        self.ask("POST", "/window/rect", json!({ "width": width, "height": height })).await;
    }

    /// What a script returns.
    async fn run(&self, script: &str) -> Value {
        self.ask("POST", "/execute/sync", json!({ "script": script, "args": [] })).await
    }

    async fn text_of(&self, selector: &str) -> String {
        let script =
            format!("const found = document.querySelector({selector:?}); return found ? found.textContent : '';");
        self.run(&script).await.as_str().unwrap_or_default().to_owned()
    }

    async fn wait_text(&self, selector: &str, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        until(what, PATIENCE, async || Some(self.text_of(selector).await).filter(|text| wanted(text))).await
    }

    /// What stands beside a name in a list of figures; empty: the name is not there.
    async fn figure(&self, list: &str, name: &str) -> String {
        let pairs = format!("{list} > div");
        let script = format!(
            "const found = [...document.querySelectorAll({pairs:?})].find(pair => pair.querySelector('dt').textContent === {name:?}); \
             return found ? found.querySelector('dd').textContent : '';"
        );
        self.run(&script).await.as_str().unwrap_or_default().to_owned()
    }

    /// The lines of one stage of the link's way.
    async fn stage(&self, side: &str, name: &str) -> Vec<String> {
        let stages = format!("#link-{LINK}-{side} .stage");
        let script = format!(
            "const found = [...document.querySelectorAll({stages:?})].find(stage => stage.querySelector('b').textContent === {name:?}); \
             return found ? [...found.querySelectorAll('small')].map(line => line.textContent) : [];"
        );
        serde_json::from_value(self.run(&script).await).unwrap_or_default()
    }

    async fn screenshot(&self, name: &str) -> PathBuf {
        let shot = self.ask("GET", "/screenshot", Value::Null).await;
        let png = STANDARD.decode(shot.as_str().expect("a picture")).expect("base64");
        assert!(png.starts_with(b"\x89PNG"), "a picture");
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target folder").join("page");
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join(name);
        std::fs::write(&path, png).unwrap();
        path
    }

    /// What stands in the console: errors of scripts, and of whatever the page loads.
    async fn console(&self) -> Vec<Value> {
        let log = self.ask("POST", "/se/log", json!({ "type": "browser" })).await;
        log.as_array().expect("a log").clone()
    }
}

/// Also where a test fails: chromedriver that is killed leaves its browser behind.
impl Drop for Browser {
    fn drop(&mut self) {
        let request = request("DELETE", &format!("/session/{}", self.session), &Value::Null);
        if let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", self.port)) {
            let answered = stream.set_read_timeout(Some(PATIENCE));
            let answered =
                answered.and_then(|()| stream.write_all(request.as_bytes())).and_then(|()| stream.read(&mut [0; 16]));
            if let Err(e) = answered {
                eprintln!("the browser could not be closed: {e}");
            }
        }
    }
}

fn request(method: &str, path: &str, body: &Value) -> String {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// The `value` of an answer, if there is one that is no error. chromedriver keeps its connections open.
async fn call(port: u16, method: &str, path: &str, body: &Value) -> Option<Value> {
    let mut stream = BufReader::new(TcpStream::connect(("127.0.0.1", port)).await.ok()?);
    stream.write_all(request(method, path, body).as_bytes()).await.ok()?;
    let (mut head, mut length) = (String::new(), 0);
    while !head.ends_with("\r\n\r\n") {
        let start = head.len();
        stream.read_line(&mut head).await.ok().filter(|read| *read > 0)?;
        if let Some((name, value)) = head[start..].split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let answer: Value = serde_json::from_slice(&body).ok()?;
    assert!(head.contains(" 200 "), "{method} {path}: {answer:#}");
    Some(answer["value"].clone())
}

fn state_of(side: &str) -> String {
    format!("#link-{LINK}-{side} .state")
}

fn figures_of(side: &str) -> String {
    format!("#link-{LINK}-{side} dl")
}

/// How long after the cut the page of this side shows it.
async fn cut_shown(browser: &Browser, side: &str, since: Instant) -> Duration {
    browser.wait_text(&state_of(side), "the cut", |text| text == "connecting").await;
    since.elapsed()
}

/// Waits until the page has so much of the origin.
async fn shows_revision(browser: &Browser, side: &str, revision: u64) {
    until("the last revision on the page", PATIENCE, async || {
        let shown = browser.figure(&figures_of(side), "in the replica up to revision").await;
        shown.replace(',', "").parse::<u64>().ok().filter(|shown| *shown >= revision)
    })
    .await;
}

/// Waits until the page says of its side's position what `/healthz?full=1` does; returns that. Of a link at rest both looks see the same.
async fn same_position(browser: &Browser, sidecar: &Sidecar, side: &str) -> Value {
    until(&format!("the page of the {side} to have the position that it has"), PATIENCE, async || {
        let entry = link_of(&sidecar.health().await?, LINK)?;
        let told = |field: &str| entry[field].to_string();
        let wanted = [
            ("seq: given or received", format!("{} (epoch {}, term {})", told("seq"), told("epoch"), told("term"))),
            ("seq: durable, applied", format!("{}, {}", told("durable_seq"), told("applied_seq"))),
            ("in the replica up to revision", told("origin_revision")),
            ("origin's head", told("head_revision")),
        ];
        for (name, value) in wanted {
            if browser.figure(&figures_of(side), name).await != value {
                return None;
            }
        }
        Some(entry)
    })
    .await
}

/// Waits until a stage of the page has the queue that `/healthz?full=1` tells, with what may wait there.
async fn same_queue(browser: &Browser, sidecar: &Sidecar, (side, stage): (&str, &str)) {
    until(&format!("the queue of {stage} on the page"), PATIENCE, async || {
        let entry = link_of(&sidecar.health().await?, LINK)?;
        let told = entry["stages"].as_array()?.iter().find(|told| told["stage"] == stage)?.clone();
        let (queue, max) = (&told["queue_bytes"], &told["queue_bytes_max"]);
        let line = browser.run(&format!("return `${{bytes({queue})}} of ${{bytes({max})}} wait`")).await;
        let lines = browser.stage(side, stage).await;
        (max.as_u64() > Some(0) && lines.iter().any(|shown| line == *shown)).then_some(())
    })
    .await;
}

/// Waits until a stage of the page has a rate of this unit that is more than nothing.
async fn some_rate(browser: &Browser, (side, stage): (&str, &str), unit: &str) {
    until(&format!("a rate in {unit} at {stage}"), PATIENCE, async || {
        let lines = browser.stage(side, stage).await;
        let rate = lines.iter().find_map(|line| line.strip_suffix(unit)?.trim().parse::<f64>().ok());
        rate.filter(|rate| *rate > 0.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_a_link_that_is_cut_and_its_healing_in_a_real_browser() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    // Each side's page in a browser of its own; the one in the dark has another folder.
    let (browser, beside) = (Browser::start(pair.dir(), false).await, Browser::start(pair.dir(), true).await);
    beside.open(&pair.replica_sidecar).await;
    browser.open(&pair.origin_sidecar).await;
    assert_eq!(ground(&browser).await, json!([false, "rgb(246, 247, 249)"]), "in the light");
    let (state, events) = (state_of("origin"), "#events");
    for (page, side) in [(&beside, "replica"), (&browser, "origin")] {
        page.wait_text(&state_of(side), "the link to follow", |text| text == "following").await;
    }
    let stages = browser.text_of(&format!("#link-{LINK}-origin .way")).await;
    for stage in ["watch", "spool", "ship", "the other side"] {
        assert!(stages.contains(stage), "{stage} is not in {stages}");
    }
    assert!(browser.text_of("#certificates").await.contains("own ends"));
    assert!(browser.text_of("#etcd").await.contains("version 3."));

    // Both pages were told just now, so that the cut comes where they wait longest for the next word.
    let revision = pair.origin.put("/app/second", "2").await;
    tokio::join!(shows_revision(&beside, "replica", revision.0), shows_revision(&browser, "origin", revision.0));
    let since = Instant::now();
    pair.proxy.cut();
    let (here, there) = tokio::join!(cut_shown(&browser, "origin", since), cut_shown(&beside, "replica", since));
    eprintln!("a cut is on the page of the origin after {here:?}, of the replica after {there:?}");
    for (shown, side) in [(here, "origin"), (there, "replica")] {
        assert!(shown <= CUT_SHOWN_MAX, "the page of the {side} shows the cut after {shown:?}");
    }
    browser.wait_text(&format!("#link-{LINK}-origin .reason"), "why", |text| !text.is_empty()).await;
    browser.screenshot("origin-cut.png").await;
    pair.origin.put("/app/third", "3").await;
    // The curve is of a look each second.
    let lags = |entry: &Value| entry["lag_seconds"].as_f64() >= Some(LAG_SHOWN_MIN + 1.5);
    pair.origin_sidecar.wait_for(LINK, "some lag", lags).await;
    pair.proxy.heal();
    browser.wait_text(&state, "its healing", |text| text == "following").await;
    browser
        .wait_text(events, "both among the events", |text| text.contains("connecting:") && text.contains("following"))
        .await;
    browser.screenshot("origin.png").await;
    let points = "return document.querySelectorAll('svg.lag polyline').length";
    assert!(browser.run(points).await.as_u64() >= Some(1), "the lag's curve");

    beside.wait_text(&state_of("replica"), "the replica's side", |text| text == "following").await;
    // Whoever comes later sees what was before.
    browser.open(&pair.origin_sidecar).await;
    browser.wait_text(events, "the cut among the events", |text| text.contains("connecting:")).await;
    let peak = "return Math.max(...[...lags.values()].flatMap(kept => kept.values))";
    until("the lag of the cut in the curve", PATIENCE, async || {
        browser.run(peak).await.as_f64().filter(|seconds| *seconds >= LAG_SHOWN_MIN)
    })
    .await;
    for page in [&browser, &beside] {
        assert_clean(page).await;
    }
}

/// It loads nothing from elsewhere, and no script has failed.
async fn assert_clean(page: &Browser) {
    let outside =
        "return performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin))";
    assert_eq!(page.run(outside).await, json!([]), "nothing is loaded from elsewhere");
    let console = page.console().await;
    assert!(console.is_empty(), "{console:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_tells_queues_and_rates_the_position_of_both_sides_the_last_proof_and_when_certificates_end() {
    let pair = Box::pin(Pair::start(over_app())).await;
    let first = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(first).await;
    pair.origin_sidecar.wait_for_state(LINK, "following").await;
    let before_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    assert_verified(&pair);
    let browser = Browser::start(pair.dir(), false).await;
    let origin = [("watch", "0 revisions wait"), ("spool", " wait"), ("ship", "0 revisions wait")];
    let replica = [
        ("receive", "no queue"),
        ("journal", "0 revisions wait"),
        ("apply", "0 revisions wait"),
        ("lookout", "no queue"),
    ];
    let sides = [
        (&pair.origin_sidecar, "origin", "spool", origin.as_slice()),
        (&pair.replica_sidecar, "replica", "journal", replica.as_slice()),
    ];
    for (sidecar, side, queues, stages) in sides {
        browser.open(sidecar).await;
        browser.wait_text(&state_of(side), "the link to follow", |text| text == "following").await;
        // The page counts from its first look on.
        let written = pair.origin.put("/app/more", side).await;
        for (stage, queue) in stages {
            let unit = if *stage == "apply" { " transactions/s" } else { " revisions/s" };
            some_rate(&browser, (side, stage), unit).await;
            let lines = format!("the queue of {stage}: {queue}");
            until(&lines, PATIENCE, async || {
                browser.stage(side, stage).await.iter().any(|line| line.ends_with(queue)).then_some(())
            })
            .await;
        }
        same_queue(&browser, sidecar, (side, queues)).await;
        shows_revision(&browser, side, written.0).await;
        let entry = same_position(&browser, sidecar, side).await;
        assert!(entry["applied_seq"].as_u64() > Some(0) && entry["head_revision"].as_u64() >= Some(written.0));

        let proof = &entry["verification"];
        let at_ms = proof["verified_at_ms"].as_u64().unwrap();
        assert!(u128::from(at_ms) >= before_ms, "{proof}");
        let date = browser.run(&format!("return new Date({at_ms}).toLocaleString()")).await;
        let shown = browser.figure(&figures_of(side), "last proved equal").await;
        let wanted = format!("{} at revision {}", date.as_str().unwrap(), proof["verified_revision"]);
        assert_eq!(shown, wanted, "of the {side}");
        if side == "origin" {
            certificates_end(&browser, sidecar).await;
        }
    }
    assert_clean(&browser).await;
}

/// The page of the origin says when its own certificate and its CA's end, as they do.
async fn certificates_end(browser: &Browser, sidecar: &Sidecar) {
    for (name, file) in [("own ends", format!("{ORIGIN_REGION}.pem")), ("CA ends", "ca.pem".to_owned())] {
        let certificate = load_identity(&sidecar.options.certs.join(file)).unwrap();
        let ends = certificate.not_after.unix_timestamp();
        let day = browser.run(&format!("return new Date({ends} * 1000).toLocaleDateString()")).await;
        let shown = browser.figure("#certificates", name).await;
        assert!(shown.starts_with(&format!("{}, in ", day.as_str().unwrap())), "{name}: {shown}, and it is {day}");
    }
}

/// Whether the browser asks for the dark, and what the page's ground is then.
async fn ground(browser: &Browser) -> Value {
    let dark = "matchMedia('(prefers-color-scheme: dark)').matches";
    browser.run(&format!("return [{dark}, getComputedStyle(document.body).backgroundColor]")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_readable_on_a_phone_and_in_the_dark() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    let browser = Browser::start(pair.dir(), true).await;
    browser.size(390, 844).await;
    browser.open(&pair.origin_sidecar).await;
    browser.wait_text(&state_of("origin"), "the link to follow", |text| text == "following").await;
    let overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert_eq!(browser.run(overflow).await, 0, "nothing is wider than the screen");
    assert_eq!(ground(&browser).await, json!([true, "rgb(16, 20, 26)"]));
    browser.screenshot("phone-dark.png").await;
    assert_clean(&browser).await;
}
