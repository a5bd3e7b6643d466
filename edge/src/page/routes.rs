//! The table of addresses.
//!
//! What reads from a source runs off the event loop. Nothing here changes anything but the sign-in, which sets a cookie.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Form, Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::get;
use maud::{Markup, html};
use serde::{Deserialize, Serialize};
use shared::uid::Uid;
use tokio::sync::{Semaphore, watch};

use super::layout::{self, Frame, Place};
use super::listing::Listing;
use super::picture::{self, Window};
use super::study_view::{self, View};
use super::{NotShown, Settings, Sources, access, live, system_view, words, worklist};
use crate::operate::exposition::TextForm;
use crate::operate::status::Status;
use crate::result::StudyResult;

/// Pictures drawn at once; the others wait.
const MAX_PICTURES: usize = 2;
/// Pictures that are drawn or wait; more are refused.
const MAX_WAITING: usize = 32;
/// How long a wrong token is answered late.
const REFUSED_PAUSE: Duration = Duration::from_millis(500);
/// Longest body of the sign-in form, in bytes.
const MAX_FORM_BYTES: usize = 4 << 10;

/// What every route sees.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(super) sources: Arc<Sources>,
    settings: watch::Receiver<Arc<Settings>>,
    listeners: live::Listeners,
    listing: Arc<Listing>,
    drawing: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

/// The page's routes.
pub(crate) fn router(sources: Sources, settings: watch::Receiver<Arc<Settings>>) -> Router {
    let shared = Shared {
        listing: Arc::new(Listing::new(sources.study_changed.subscribe())),
        sources: Arc::new(sources),
        settings,
        listeners: live::Listeners::default(),
        drawing: Arc::new(Semaphore::new(MAX_PICTURES)),
        waiting: Arc::new(Semaphore::new(MAX_WAITING)),
    };
    Router::new()
        .route("/", get(worklist_page))
        .route("/studies/{uid}", get(study_page))
        .route("/studies/{uid}/slices/{file}", get(slice_picture))
        .route("/system", get(system_page))
        .route("/api/studies", get(api_studies))
        .route("/api/studies/{uid}", get(api_study))
        .route("/api/status", get(api_status))
        .route("/metrics", get(metrics))
        .route("/events", get(events))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/sign-in", get(door).post(sign_in))
        .route(access::STYLE.path, get(async || access::STYLE.answer()))
        .route(access::SCRIPT.path, get(async || access::SCRIPT.answer()))
        .route(access::ICON.path, get(async || access::ICON.answer()))
        .fallback(async || not_found("There is no such page."))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_FORM_BYTES))
        .layer(axum::middleware::from_fn_with_state(
            shared.clone(),
            access::guard,
        ))
        .with_state(shared)
}

impl Shared {
    /// As they are now; a reload may change them.
    pub(super) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.borrow())
    }
}

/// Runs what may block, with the sources.
async fn read<T: Send + 'static>(
    shared: &Shared,
    from: impl FnOnce(&Sources) -> T + Send + 'static,
) -> Result<T, Response> {
    let sources = Arc::clone(&shared.sources);
    tokio::task::spawn_blocking(move || from(&sources))
        .await
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

fn frame(status: &Status) -> Frame {
    Frame {
        is_demonstration: status.is_demonstration,
        problems: status.problems.clone(),
    }
}

fn show(title: &str, place: Place, status: &Status, main: &Markup) -> Response {
    Html(layout::page(title, place, &frame(status), main)).into_response()
}

fn not_found(words: &str) -> Response {
    let main = html! { section.empty { h1 { "Not found" } p { (words) } p { a href="/" { "Worklist" } } } };
    let page = layout::page("Not found", Place::Study, &Frame::default(), &main);
    (StatusCode::NOT_FOUND, Html(page)).into_response()
}

async fn worklist_page(State(shared): State<Shared>) -> Result<Response, Response> {
    let is_anonymous = shared.settings().is_anonymous;
    let listing = Arc::clone(&shared.listing);
    read(&shared, move |sources| {
        let status = (sources.status)();
        let n_studies = usize::try_from(status.studies).unwrap_or(usize::MAX);
        let (each, one) = (&*sources.studies, &*sources.study);
        let (rows, n_more) = listing.rows(each, one, n_studies, is_anonymous);
        let main = worklist::page(&rows, n_more);
        show("Worklist", Place::Worklist, &status, &main)
    })
    .await
}

async fn study_page(
    State(shared): State<Shared>,
    Path(uid): Path<String>,
    view: Result<Query<View>, QueryRejection>,
) -> Result<Response, Response> {
    let Ok(uid) = Uid::new(&uid) else {
        return Ok(not_found("There is no such study."));
    };
    let is_anonymous = shared.settings().is_anonymous;
    let view = view.map(|Query(view)| view).unwrap_or_default();
    read(&shared, move |sources| match (sources.study)(&uid) {
        Some(result) => {
            let main = study_view::page(&result, view, is_anonymous);
            show("Study", Place::Study, &(sources.status)(), &main)
        }
        None => not_found("There is no such study; it may have been deleted by age."),
    })
    .await
}

/// The query of a picture's address.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
struct PictureQuery {
    window: Window,
    heatmap: u8,
}

async fn slice_picture(
    State(shared): State<Shared>,
    Path((uid, file)): Path<(String, String)>,
    query: Result<Query<PictureQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Response> {
    let index = file
        .strip_suffix(".png")
        .and_then(|index| index.parse::<usize>().ok());
    let (Ok(uid), Some(index), Ok(Query(query))) = (Uid::new(&uid), index, query) else {
        return Err(StatusCode::NOT_FOUND.into_response());
    };
    let found = read(&shared, move |sources| {
        let result = (sources.study)(&uid)?;
        Some((result.slices.get(index)?.clone(), result.model.digest))
    });
    let Some((slice, model)) = found.await? else {
        return Err(StatusCode::NOT_FOUND.into_response());
    };
    let identity = format!(
        "{} {:?} {} {query:?} {model}",
        slice.sop_uid, slice.frame, slice.sequence
    );
    let tag = format!("\"{}\"", blake3::hash(identity.as_bytes()).to_hex());
    let cached = [
        (header::CACHE_CONTROL, "private, no-cache"),
        (header::ETAG, tag.as_str()),
    ];
    if headers
        .get(header::IF_NONE_MATCH)
        .is_some_and(|known| known.as_bytes() == tag.as_bytes())
    {
        return Ok((StatusCode::NOT_MODIFIED, cached).into_response());
    }
    let Ok(_place) = shared.waiting.try_acquire() else {
        return Err((StatusCode::SERVICE_UNAVAILABLE, NotShown::Busy.to_string()).into_response());
    };
    let Ok(_turn) = shared.drawing.acquire().await else {
        return Err(StatusCode::SERVICE_UNAVAILABLE.into_response());
    };
    let drawn = read(&shared, move |sources| {
        let shown = (sources.slice)(&slice, query.heatmap == 1)?;
        sources.metrics.pictures.inc();
        picture::png(&shown, query.window)
    });
    match drawn.await? {
        Ok(png) => Ok(([(header::CONTENT_TYPE, "image/png")], cached, png).into_response()),
        Err(reason) => {
            let code = match reason {
                NotShown::Purged => StatusCode::GONE,
                NotShown::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
                NotShown::Busy => StatusCode::SERVICE_UNAVAILABLE,
            };
            Err((code, reason.to_string()).into_response())
        }
    }
}

async fn system_page(State(shared): State<Shared>) -> Result<Response, Response> {
    read(&shared, |sources| {
        let status = (sources.status)();
        show(
            "System",
            Place::System,
            &status,
            &system_view::page(&status),
        )
    })
    .await
}

/// A study in `/api/studies`. No name of a patient: programs have the UID.
#[derive(Debug, Serialize)]
struct ApiStudy {
    study_uid: Uid,
    series_uid: Option<Uid>,
    revision: u32,
    state: crate::result::State,
    outcome: crate::result::Outcome,
    statement: String,
    score: Option<f32>,
    probability: Option<f32>,
    slices: usize,
    /// How far the analysis came.
    attempt: Option<crate::result::Attempt>,
    analysed: usize,
    not_analysed: usize,
    first_received_ms: i64,
    last_received_ms: i64,
    decided_ms: i64,
    model: String,
    is_demonstration: bool,
    is_phantom: bool,
    research_use: &'static str,
}

impl From<&StudyResult> for ApiStudy {
    fn from(result: &StudyResult) -> Self {
        Self {
            study_uid: result.study_uid.clone(),
            series_uid: result.series_uid.clone(),
            revision: result.revision,
            state: result.state,
            outcome: result.outcome.clone(),
            statement: words::words(result).sentence,
            score: result.score,
            probability: result.score.map(shared::probability::sigmoid),
            slices: result.slices.len(),
            attempt: result.attempt(),
            analysed: result.n_analysed(),
            not_analysed: result.n_not_analysed(),
            first_received_ms: result.first_received_ms,
            last_received_ms: result.last_received_ms,
            decided_ms: result.decided_ms,
            model: result.model.name.clone(),
            is_demonstration: result.model.is_demonstration,
            is_phantom: result.is_phantom,
            research_use: shared::RESEARCH_USE,
        }
    }
}

fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn api_studies(State(shared): State<Shared>) -> Result<Response, Response> {
    read(&shared, |sources| {
        let mut studies = Vec::new();
        (sources.studies)(&mut |result| {
            studies.push((words::place(&result), ApiStudy::from(&result)));
        });
        studies.sort_by_key(|(place, _)| *place);
        json(
            &studies
                .into_iter()
                .map(|(_, study)| study)
                .collect::<Vec<_>>(),
        )
    })
    .await
}

/// One study with its slices.
#[derive(Debug, Serialize)]
struct ApiStudyWhole {
    #[serde(flatten)]
    study: ApiStudy,
    slice_results: Vec<crate::result::SliceResult>,
    not_judged: Vec<crate::result::OtherSeries>,
}

async fn api_study(
    State(shared): State<Shared>,
    Path(uid): Path<String>,
) -> Result<Response, Response> {
    let Ok(uid) = Uid::new(&uid) else {
        return Err(StatusCode::NOT_FOUND.into_response());
    };
    read(&shared, move |sources| match (sources.study)(&uid) {
        Some(result) => json(&ApiStudyWhole {
            study: ApiStudy::from(&result),
            slice_results: result.slices,
            not_judged: result.not_judged,
        }),
        None => StatusCode::NOT_FOUND.into_response(),
    })
    .await
}

async fn api_status(State(shared): State<Shared>) -> Result<Response, Response> {
    read(&shared, |sources| json(&(sources.status)())).await
}

async fn metrics(State(shared): State<Shared>, headers: HeaderMap) -> Result<Response, Response> {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    let form = TextForm::accepted(accept.unwrap_or_default());
    let text = read(&shared, move |sources| sources.metrics_text(form)).await?;
    Ok(([(header::CONTENT_TYPE, form.content_type())], text).into_response())
}

async fn events(State(shared): State<Shared>) -> Response {
    live::events(shared.sources.changed.subscribe(), &shared.listeners)
}

/// 200 while objects are accepted and analysed.
async fn ready(State(shared): State<Shared>) -> Result<Response, Response> {
    let status = read(&shared, |sources| (sources.status)()).await?;
    if status.state == "ready" {
        return Ok("ready\n".into_response());
    }
    let text = format!("{}\n", status.state);
    Ok((StatusCode::SERVICE_UNAVAILABLE, text).into_response())
}

fn door_page(is_refused: bool) -> String {
    let main = html! {
        section.door {
            h1 { "Sign in" }
            form method="post" action="/sign-in" {
                label for="token" { "Access token" }
                input #token type="password" name="token" autocomplete="current-password" required autofocus aria-describedby=[is_refused.then_some("refused")];
                @if is_refused { p #refused.refused role="alert" { "That is not the token." } }
                button type="submit" { "Sign in" }
            }
        }
    };
    layout::page("Sign in", Place::SignIn, &Frame::default(), &main)
}

async fn door() -> Response {
    Html(door_page(false)).into_response()
}

/// The sign-in form.
#[derive(Debug, Deserialize)]
struct SignIn {
    token: String,
}

async fn sign_in(State(shared): State<Shared>, Form(form): Form<SignIn>) -> Response {
    match &shared.settings().token {
        Some(token) if access::is_same(form.token.trim(), token) => {
            let cookie = [(header::SET_COOKIE, access::cookie(token))];
            (cookie, Redirect::to("/")).into_response()
        }
        Some(_) => {
            // Whoever tries many waits long.
            tokio::time::sleep(REFUSED_PAUSE).await;
            (StatusCode::FORBIDDEN, Html(door_page(true))).into_response()
        }
        None => Redirect::to("/").into_response(),
    }
}
