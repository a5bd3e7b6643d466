//! Deciding within the node: what of the configuration and the node it is given.
//!
//! In: the configuration and what the parts of the node share. Out: the opened store, the running threads.

use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;

use super::store::{Enqueue, Origin, Present, Store, StoreError};
use super::studies::deleted_beside;
use super::{Deciding, Given, Sound};
use crate::cli::ModelArgs;
use crate::config::Config;
use crate::exit::{Exit, Failure, failure};
use crate::intake::spool::Spool;
use crate::operate;
use crate::operate::model_store::ModelStore;
use crate::send::outbox::{self, Channels};
use crate::serve::NodeState;
use crate::vital;
use crate::wire::Reason;

/// Opens the results database; one that is missing or broken is made anew from what the spool holds.
///
/// # Errors
/// `Configuration` for one of a later version: no restart helps; `CannotWrite` where the medium fails.
pub(crate) fn open_store(config: &Config, spool: &Spool) -> Result<Arc<Store>, Failure> {
    let path = config.state_dir.join("results.redb");
    let present = Present {
        latest: *spool.latest().borrow(),
        deleted: deleted_beside(spool.sequences_after(0)),
    };
    let store = Store::open(&path, &present).map_err(|error| {
        let exit = match error {
            StoreError::Newer { .. } => Exit::Configuration,
            _ => Exit::CannotWrite,
        };
        failure(exit)(anyhow!(error).context(path.display().to_string()))
    })?;
    match store.origin() {
        Origin::Found => {}
        Origin::Missing => {
            tracing::error!("results.redb is missing: every stored study is decided and sent again")
        }
        Origin::Broken(fault) => tracing::error!(
            fault,
            "results.redb is broken and was set aside as results.redb.broken: every stored study is decided and sent again"
        ),
    }
    Ok(store)
}

/// Loads the model, which may take seconds, and starts to decide. Objects are taken in meanwhile.
///
/// # Errors
/// `Configuration` where there is no such model file; `Unavailable` where the system refuses threads.
pub(crate) async fn start(node: &Arc<NodeState>) -> Result<Deciding, Failure> {
    let config = Arc::clone(&node.config.borrow());
    let (loading, models) = (Arc::clone(&config), node.models.clone());
    let model = tokio::task::spawn_blocking(move || {
        let arguments = ModelArgs {
            model: loading.model.clone(),
            threads: loading.threads,
            kernel: None,
            float: false,
        };
        load(&models, &arguments)
    });
    let (model, rolled_back) = model
        .await
        .map_err(|error| failure(Exit::Unavailable)(anyhow!(error)))??;
    if rolled_back {
        operate::watch::rolled_back(node);
    }
    node.model.send_replace(model.state());
    tell_page(node);
    let worker = super::worker_command()
        .context("the program's own path")
        .map_err(failure(Exit::Unavailable))?;
    let ready = match &model {
        Sound::Ready(ready) => Some(ready.as_ref()),
        Sound::Degraded { .. } => None,
    };
    node.slices.begin(worker.clone(), ready);
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

/// The model of the configuration; else the installed one in force, or the one before where that fails; else the demonstration model. Whether
/// the one before was brought back.
fn load(models: &ModelStore, arguments: &ModelArgs) -> Result<(Sound, bool), Failure> {
    let options = arguments.options();
    if arguments.model.is_some() {
        return Ok((Sound::load(arguments.model.as_deref(), &options)?, false));
    }
    let chosen = models.choose(|path| match Sound::load(path, &options)? {
        Sound::Degraded { reason } if path.is_some() => {
            Err(failure(Exit::FailedCheck)(anyhow!(reason.to_string())))
        }
        sound => Ok(sound),
    });
    match chosen {
        Ok(chosen) => {
            if let Some(reason) = &chosen.rolled_back {
                tracing::error!(reason, "the model before is in force again");
            }
            Ok((chosen.loaded, chosen.rolled_back.is_some()))
        }
        Err(failure) => {
            let reason = Reason::new("model", failure.to_string());
            tracing::error!(%reason, "degraded: slices are kept and not analysed");
            Ok((Sound::Degraded { reason }, false))
        }
    }
}

/// Into the outbox goes what may leave, over the channels that are configured at that moment.
fn enqueue(config: watch::Receiver<Arc<Config>>) -> Box<Enqueue> {
    Box::new(move |transaction, result| {
        let channels = Channels::configured(&config.borrow());
        Ok(outbox::enqueue(transaction, result, &channels)?)
    })
}

/// The page only wants to know that something changed.
fn tell_page(node: &Arc<NodeState>) {
    let mut changes = node.changed.subscribe();
    let page = node.page_changed.clone();
    tokio::spawn(vital::task("page", async move {
        loop {
            match changes.recv().await {
                // An error of the page's channel means that nobody watches.
                Ok(_) | Err(RecvError::Lagged(_)) => drop(page.send(())),
                Err(RecvError::Closed) => return,
            }
        }
    }));
}
