//! Job: the status page at `/`, and the stream of events that keeps it live.
//! Input: GET requests; the links' statuses; the history of the last hour. Output: one self-contained page; server-sent events.
//! Edge: reads statuses, changes nothing.
//! Always true: the page loads nothing from elsewhere and may be framed by nobody; only so many watch at once, each for so long; no key is shown.

use super::http::{Shared, plain};
use crate::model::LinkStatus;
use axum::extract::{Extension, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const PAGE: &str = include_str!("page.html");
/// Nothing from elsewhere, and no form; its own script and style stand in the page.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// How often an open page is told how the links are.
pub(super) const TELL_EVERY: Duration = Duration::from_secs(1);
/// A cut is to be on the page within three seconds: one until the page is told next, two for a status, a network and a browser that are slow.
const _: () = assert!(TELL_EVERY.as_millis() <= 1_000, "an open page is told each second how the links are");
/// A few people on call. Others are told to try again.
pub(super) const VIEWERS_MAX: usize = 16;
/// After so long a page asks anew, by itself: so nobody holds a place for ever.
pub(super) const VIEW_MAX: Duration = Duration::from_secs(600);

/// Set by who answers with a stream: its connection may live for [`VIEW_MAX`].
pub(super) type Lasting = Arc<AtomicBool>;

/// One look at everything, as the page draws it.
#[derive(Serialize)]
struct Look<'a> {
    now_ms: u64,
    #[serde(flatten)]
    health: super::http::FullHealth<'a>,
}

pub(super) async fn serve_page() -> Response {
    let mut response = PAGE.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// First the past, then each second how things are, and what happened since.
pub(super) async fn serve_events(State(shared): State<Shared>, Extension(lasting): Extension<Lasting>) -> Response {
    let Ok(place) = shared.viewers.clone().try_acquire_owned() else {
        let busy = format!("{VIEWERS_MAX} pages are open already: close one\n");
        return plain(StatusCode::SERVICE_UNAVAILABLE, busy);
    };
    lasting.store(true, Ordering::Relaxed);
    let events = async_stream::stream! {
        let _place = place;
        let past = shared.history().past();
        let mut told = shared.history().told();
        yield told_as("history", &past);
        let mut ticks = tokio::time::interval(TELL_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shared.stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            shared.directory.refresh().await;
            let health = super::http::full_health(&shared.directory);
            yield told_as("status", &Look { now_ms: now_ms(), health });
            let happened = shared.history().after(told);
            for event in happened {
                told = event.number;
                yield told_as("happened", &event);
            }
        }
    };
    let mut response = Sse::new(events).into_response();
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn told_as(name: &str, what: &impl Serialize) -> Result<Event, Infallible> {
    // Strings, numbers and lists of them: serde_json has no way to fail on these.
    let json = serde_json::to_string(what).unwrap_or_default();
    Ok(Event::default().event(name).data(json))
}

/// Looks at the links for the history.
pub(super) fn note(shared: &Shared, links: &[LinkStatus]) {
    shared.history().look(now_ms(), links);
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
