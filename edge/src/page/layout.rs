//! The frame of every page: head, banners, navigation, the words that must stand everywhere.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::access;

/// Which entry of the navigation is current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The worklist.
    Worklist,
    /// A study.
    Study,
    /// The system view.
    System,
    /// The door, where nothing else is reached.
    SignIn,
}

/// What the frame needs to know.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frame {
    /// Whether the model was trained on the phantom.
    pub(crate) is_demonstration: bool,
    /// What is wrong with the daemon, in words.
    pub(crate) problems: Vec<String>,
}

/// A page.
pub(crate) fn page(title: &str, place: Place, frame: &Frame, main: &Markup) -> String {
    let entry = |to: Place, address: &str, name: &str| {
        html! { a href=(address) aria-current=[(place == to).then_some("page")] { (name) } }
    };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="dark";
                meta name="referrer" content="no-referrer";
                title { (title) " · PE Edge" }
                link rel="icon" href="/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href=(access::STYLE.address());
                script src=(access::SCRIPT.address()) defer {}
            }
            body {
                a.skip href="#main" { "Skip to content" }
                header {
                    a.brand href="/" { (mark()) span { "PE Edge" } }
                    @if place != Place::SignIn {
                        nav aria-label="Main" {
                            (entry(Place::Worklist, "/", "Worklist"))
                            (entry(Place::System, "/system", "System"))
                        }
                    }
                    p.notice { "Research use only. Not a medical device." }
                    span #live-mark.offline role="status" { span.dot aria-hidden="true" {} span #live-text { "" } }
                }
                main #main tabindex="-1" data-place=(format!("{place:?}")) {
                    @if frame.is_demonstration {
                        p.banner.demonstration role="note" { strong { "Demonstration model." } " Trained on synthetic data: its answers mean nothing for a patient, and real patients are not reordered." }
                    }
                    @for problem in &frame.problems {
                        p.banner.problem role="alert" { strong { "Attention. " } (problem) }
                    }
                    (main)
                }
                p #announce.unseen aria-live="polite" {}
            }
        }
    }
    .into_string()
}

/// The mark: a vessel with a filling defect.
pub(crate) fn mark() -> Markup {
    PreEscaped(include_str!("icon.svg").trim().to_owned())
}

/// A moment, as UTC; the script writes it in the reader's own time.
pub(crate) fn moment(unix_ms: i64) -> Markup {
    let Ok(time) = jiff::Timestamp::from_millisecond(unix_ms) else {
        return html! { "unknown" };
    };
    html! { time datetime=(time.strftime("%Y-%m-%dT%H:%M:%SZ")) { (time.strftime("%Y-%m-%d %H:%M UTC")) } }
}
