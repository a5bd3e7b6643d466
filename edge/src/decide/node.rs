//! Deciding within the node: what of the configuration and the node it is given.
//!
//! In: the configuration and what the parts of the node share. Out: the opened store, the running threads.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;

use super::store::{Enqueue, Store, StoreError};
use super::{Deciding, Given, Sound};
use crate::cli::ModelArgs;
use crate::config::Config;
use crate::exit::{Exit, Failure, failure};
use crate::send::outbox::{self, Channels};
use crate::serve::NodeState;

/// Opens the results database.
///
/// # Errors
/// `Configuration` for one of a later version: no restart helps; `CannotWrite` where it is broken or the medium fails.
pub(crate) fn open_store(config: &Config) -> Result<Arc<Store>, Failure> {
    let path = config.state_dir.join("results.redb");
    Store::open(&path).map_err(|error| {
        let exit = match error {
            StoreError::Newer { .. } => Exit::Configuration,
            _ => Exit::CannotWrite,
        };
        failure(exit)(anyhow!(error).context(path.display().to_string()))
    })
}

/// Loads the model, which may take seconds, and starts to decide. Objects are taken in meanwhile.
///
/// # Errors
/// `Configuration` where there is no such model file; `Unavailable` where the system refuses threads.
pub(crate) async fn start(node: &Arc<NodeState>) -> Result<Deciding, Failure> {
    let config = Arc::clone(&node.config.borrow());
    let loading = Arc::clone(&config);
    let model = tokio::task::spawn_blocking(move || {
        let arguments = ModelArgs {
            model: loading.model.clone(),
            threads: loading.threads,
            kernel: None,
        };
        Sound::load(arguments.model.as_deref(), &arguments.options())
    });
    let model = model
        .await
        .map_err(|error| failure(Exit::Unavailable)(anyhow!(error)))??;
    node.model.send_replace(model.state());
    tell_page(node);
    let worker = super::worker_command()
        .context("the program's own path")
        .map_err(failure(Exit::Unavailable))?;
    Deciding::start(Given {
        spool: Arc::clone(&node.spool),
        store: Arc::clone(&node.store),
        model,
        worker,
        quiet_time: config.quiet_time,
        limits: crate::series::Limits::default(),
        enqueue: enqueue(node.config.clone()),
        changed: node.changed.clone(),
        counters: Arc::clone(&node.counters),
        now_ms: super::now_ms,
    })
    .map_err(failure(Exit::Unavailable))
}

/// Into the outbox goes what may leave, over the channels that are configured at that moment.
fn enqueue(config: watch::Receiver<Arc<Config>>) -> Box<Enqueue> {
    Box::new(move |transaction, result| {
        let channels = Channels::configured(&config.borrow());
        if result.may_leave(channels.allow_demo_results) {
            outbox::enqueue(transaction, result, &channels)?;
        }
        Ok(())
    })
}

/// The page only wants to know that something changed.
fn tell_page(node: &Arc<NodeState>) {
    let mut changes = node.changed.subscribe();
    let page = node.page_changed.clone();
    tokio::spawn(async move {
        loop {
            match changes.recv().await {
                // An error of the page's channel means that nobody watches.
                Ok(_) | Err(RecvError::Lagged(_)) => drop(page.send(())),
                Err(RecvError::Closed) => return,
            }
        }
    });
}
