//! Job: the status page as a person sees it: in a real browser, before two running sidecars.
//! Input: a pair; Debian's chromium, driven by chromedriver (W3C WebDriver). Output: passes or fails; screenshots under `target/page/`.
//! Always true: what is judged stands on the page; the browser's console is empty at the end.

use crate::bed::pair::{LINK, Pair, PairOptions};
use crate::bed::process::Process;
use crate::bed::sidecar::Sidecar;
use crate::bed::{PATIENCE, until};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use etcd_ferry::demo::ports::free_port;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// From the cut to the page that shows it.
const SHOWN_WITHIN: Duration = Duration::from_secs(3);

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
        let port = free_port().unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_a_link_that_is_cut_and_its_healing_in_a_real_browser() {
    let pair = Box::pin(Pair::start(PairOptions::default())).await;
    let revision = pair.origin.put("/app/first", "1").await;
    pair.wait_applied(revision).await;
    let browser = Browser::start(pair.dir(), false).await;
    browser.open(&pair.origin_sidecar).await;
    let (state, events) = (state_of("origin"), "#events");
    browser.wait_text(&state, "the link to follow", |text| text == "following").await;
    let stages = browser.text_of(&format!("#link-{LINK}-origin .way")).await;
    for stage in ["watch", "spool", "ship", "the other side"] {
        assert!(stages.contains(stage), "{stage} is not in {stages}");
    }
    assert!(browser.text_of("#certificates").await.contains("own ends"));
    assert!(browser.text_of("#etcd").await.contains("version 3."));

    pair.proxy.cut();
    let since = Instant::now();
    browser.wait_text(&state, "the cut", |text| text == "connecting").await;
    assert!(since.elapsed() < SHOWN_WITHIN, "it took {:?}", since.elapsed());
    browser.wait_text(&format!("#link-{LINK}-origin .reason"), "why", |text| !text.is_empty()).await;
    browser.screenshot("origin-cut.png").await;
    pair.proxy.heal();
    browser.wait_text(&state, "its healing", |text| text == "following").await;
    browser
        .wait_text(events, "both among the events", |text| text.contains("connecting:") && text.contains("following"))
        .await;
    browser.screenshot("origin.png").await;
    let points = "return document.querySelectorAll('svg.lag polyline').length";
    assert!(browser.run(points).await.as_u64() >= Some(1), "the lag's curve");

    browser.open(&pair.replica_sidecar).await;
    browser.wait_text(&state_of("replica"), "the replica's side", |text| text == "following").await;
    let outside =
        "return performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin))";
    assert_eq!(browser.run(outside).await, json!([]), "nothing is loaded from elsewhere");
    let console = browser.console().await;
    assert!(console.is_empty(), "{console:#?}");
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
    let ground = browser.run("return getComputedStyle(document.body).backgroundColor").await;
    let dark = browser.run("return matchMedia('(prefers-color-scheme: dark)').matches").await;
    assert_eq!((dark, ground), (json!(true), json!("rgb(16, 20, 26)")));
    browser.screenshot("phone-dark.png").await;
}
