//! Parts without which the node would seem to work and not do so: a fault in one ends the program.
//!
//! In: the work of a thread or a task. Out: what it gives, or SIGABRT where it panics. What was
//! acknowledged is durable, so that the service manager's restart continues where the fault was; a node that goes on without its decider,
//! its writer or its outbox would be silent. What serves one connection or one page request is not vital: its fault ends it alone.

use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::pin::pin;
use std::sync::OnceLock;

static BEFORE_THE_END: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();

/// Does work that is vital, under a name for the log.
pub(crate) fn work<T>(part: &'static str, work: impl FnOnce() -> T) -> T {
    // Nothing is used any more after a panic.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| end(part))
}

/// As [`work`], for a task.
pub(crate) async fn task<T>(part: &'static str, task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    std::future::poll_fn(move |context| work(part, || task.as_mut().poll(context))).await
}

/// Sets what is done before a fault ends the program.
pub(crate) fn before_the_end(work: impl Fn() + Send + Sync + 'static) {
    // A program has one node; the first stays.
    drop(BEFORE_THE_END.set(Box::new(work)));
}

fn end(part: &'static str) -> ! {
    tracing::error!(part, "ended by a fault; so the node ends");
    if let Some(work) = BEFORE_THE_END.get() {
        work();
    }
    std::process::abort();
}

/// Has the log say where a panic was. What it says may be of a patient, and is left out.
pub(crate) fn log_panics() {
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(place, "a fault of this program");
    }));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Environment of [`a_vital_part_fails`].
    const CHILD: &str = "PE_EDGE_TEST_VITAL";
    const SIGABRT: i32 = 6;

    /// The other side of the test below; by itself it does nothing.
    #[test]
    fn a_vital_part_fails() {
        let Ok(kind) = std::env::var(CHILD) else {
            return;
        };
        crate::operate::log::begin();
        log_panics();
        before_the_end(|| tracing::error!("is done before"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let fails = async { panic!("DOE^JANE") };
        let ended = runtime.block_on(async {
            match kind.as_str() {
                "vital" => tokio::spawn(task("decider", fails)).await,
                _ => tokio::spawn(fails).await,
            }
        });
        assert!(ended.is_err());
    }

    #[test]
    fn a_fault_of_a_vital_part_ends_the_program_and_names_no_patient() {
        for (kind, signal) in [("vital", Some(SIGABRT)), ("other", None)] {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "vital::tests::a_vital_part_fails", "--nocapture"])
                .env(CHILD, kind)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), signal, "{said}");
            assert_eq!(output.status.success(), signal.is_none(), "{said}");
            assert!(said.contains("src/vital.rs:"), "{said}");
            assert!(!said.contains("DOE"), "{said}");
            assert_eq!(said.contains("decider"), signal.is_some(), "{said}");
            assert_eq!(said.contains("is done before"), signal.is_some(), "{said}");
        }
    }
}
