//! Starts the parts of the node, reloads its configuration on SIGHUP and stops it gracefully on SIGTERM.
//!
//! In: a configuration file or none. The listener is up before anything slow begins. What a part does is its own business; here stands only
//! what is started in which order, and how it ends.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use crate::cli::{ConfigCommand, ServeArgs};
use crate::config::{self, Config, ConfigError};
use crate::decide::counters::Counters;
use crate::decide::store::Store;
use crate::decide::{self, Changed, ModelState};
use crate::exit::{Exit, Failure, failure, said};
use crate::intake::spool::{Spool, SpoolError, SpoolLimits};
use crate::intake::{Intake, Listener, retention, tls, watch_folder};
use crate::operate::audit::{Audit, Event};
use crate::operate::metrics::Metrics;
use crate::operate::model_store::ModelStore;
use crate::send::outbox::Outbox;
use crate::{commitment, operate, page, send, vital};

/// Threads of the runtime; the network and the worker have their own.
const RUNTIME_THREADS: usize = 2;
/// How long a stop waits for exchanges and writes that block.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// Changes that a listening browser may lag behind; more are told as one.
const PAGE_CHANGES: usize = 16;

/// Changes that a slow watcher may be behind before it misses some.
const CHANGES: usize = 256;

/// What the parts of the node share.
#[derive(Debug)]
pub(crate) struct NodeState {
    /// What came in.
    pub(crate) spool: Arc<Spool>,
    /// The configuration in force.
    pub(crate) config: watch::Receiver<Arc<Config>>,
    /// The DICOM side and its counters.
    pub(crate) intake: Arc<Intake>,
    /// What was decided.
    pub(crate) store: Arc<Store>,
    /// What is to be told.
    pub(crate) outbox: Arc<Outbox>,
    /// What deciding has counted.
    pub(crate) counters: Arc<Counters>,
    /// The model and its self-test.
    pub(crate) model: watch::Sender<ModelState>,
    /// Told of every change of a study.
    pub(crate) changed: broadcast::Sender<Changed>,
    /// True as soon as the node stops.
    pub(crate) stopping: watch::Receiver<bool>,
    /// When the node started.
    pub(crate) started: Instant,
    /// What is counted with labels.
    pub(crate) metrics: Metrics,
    /// The page shows something else than before.
    pub(crate) page_changed: broadcast::Sender<()>,
    /// Reads slices for the page.
    pub(crate) slices: page::slices::Slices,
    /// Who sent what, and what was decided.
    pub(crate) audit: Arc<Audit>,
    /// The models installed.
    pub(crate) models: ModelStore,
}

/// `edge serve`.
///
/// # Errors
/// `Configuration` for faults of the file, `Unavailable` where a port or the state folder is in use, `CannotWrite` where the state
/// folder cannot be written.
pub(crate) fn run(arguments: &ServeArgs) -> Result<Exit, Failure> {
    let config = load(arguments.config.as_deref())?;
    operate::log::begin();
    vital::log_panics();
    // What is written belongs to patients: for the node's user alone, whatever the shell that starts it allows.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    forbid_core_files()
        .context("limit of core files")
        .map_err(failure(Exit::Unavailable))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build()
        .context("starting the runtime")
        .map_err(failure(Exit::Unavailable))?;
    let done = runtime.block_on(serve(config, arguments.config.clone()));
    // What blocks is durable or is done again; a webhook that does not answer holds no stop up.
    runtime.shutdown_timeout(STOP_PATIENCE);
    done
}

/// A program that aborts would leave the images and names in its memory on the medium.
fn forbid_core_files() -> std::io::Result<()> {
    let none = rustix::process::Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(rustix::process::setrlimit(
        rustix::process::Resource::Core,
        none,
    )?)
}

/// `edge check`.
///
/// # Errors
/// `Configuration` for faults of the file.
pub(crate) fn check(arguments: &ServeArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let config = load(arguments.config.as_deref())?;
    let faults = faults_of_files(&config);
    if !faults.is_empty() {
        let faults: Vec<String> = faults.iter().map(said).collect();
        let error = anyhow!("{} fault(s)\n  {}", faults.len(), faults.join("\n  "));
        return Err(failure(Exit::Configuration)(error));
    }
    writeln!(out, "no faults").map_err(failure(Exit::CannotWrite))?;
    Ok(Exit::Ok)
}

/// `edge config`.
///
/// # Errors
/// `Configuration` for faults of the file, `CannotWrite` where the output is gone.
pub(crate) fn config(command: &ConfigCommand, out: &mut impl Write) -> Result<Exit, Failure> {
    let text = match command {
        ConfigCommand::Init => config::INITIAL.to_owned(),
        ConfigCommand::Show(arguments) => config::show(&load(arguments.config.as_deref())?),
    };
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(failure(Exit::CannotWrite))?;
    Ok(Exit::Ok)
}

/// What is wrong with the files that a configuration names, as far as it can be seen without starting: all of them at once.
fn faults_of_files(config: &Config) -> Vec<anyhow::Error> {
    let tls = config.tls.iter().flat_map(tls::faults);
    let tls = tls.map(|fault| anyhow!(fault).context("[tls]"));
    let token = page::node::settings(config).map(drop);
    let model = config.model.as_ref().map_or(Ok(()), |path| {
        let opened = std::fs::File::open(path).map(drop);
        opened.with_context(|| format!("model {}", path.display()))
    });
    let watched = config.watch_folder.as_ref().map_or(Ok(()), |path| {
        let listed = std::fs::read_dir(path).map(drop);
        listed.with_context(|| format!("watch_folder {}", path.display()))
    });
    let secrets = send::node::faults_of_secrets(config);
    let others = [token.err(), model.err(), watched.err()];
    tls.chain(others.into_iter().flatten())
        .chain(secrets)
        .collect()
}

fn load(path: Option<&Path>) -> Result<Config, Failure> {
    Config::load(path).map_err(failure::<ConfigError>(Exit::Configuration))
}

async fn serve(config: Config, path: Option<PathBuf>) -> Result<Exit, Failure> {
    let signals = Signals::new().map_err(failure(Exit::Unavailable))?;
    let spool = open_spool(&config)?;
    let store = decide::node::open_store(&config, &spool)?;
    // Whatever else is wrong: where the database is, too, the next start finds out and makes it anew, instead of failing again.
    let suspected = Arc::clone(&store);
    vital::before_the_end(move || suspected.suspect());
    let done = work(config, path, signals, spool, Arc::clone(&store)).await;
    if done
        .as_ref()
        .is_err_and(|failure| failure.exit != Exit::Configuration)
    {
        store.suspect();
    }
    done
}

/// Starts every part, and works until the node stops.
async fn work(
    config: Config,
    path: Option<PathBuf>,
    mut signals: Signals,
    spool: Arc<Spool>,
    store: Arc<Store>,
) -> Result<Exit, Failure> {
    let outbox = send::node::open_outbox(&store)?;
    let (listener, dicom_address) = dicom_listener(&config)?;
    let audit = Arc::new(operate::watch::open_audit(&config)?);
    let models = ModelStore::new(&config.state_dir);
    let (page_listener, page_settings) = page_listener(&config).await?;
    let (reload, config) = watch::channel(Arc::new(config));
    let (stop, stopping) = watch::channel(false);
    let (tls, identity) = watch::channel(load_tls(&config.borrow())?);
    let page_changed = broadcast::channel(PAGE_CHANGES).0;
    let commitments = commitment::node::open(&store.database(), &spool, &audit, &page_changed)?;
    let intake = Intake::new(Arc::clone(&spool), config.clone(), identity, commitments);
    let intake = Arc::new(intake);
    intake.visitors.audit_to(Arc::clone(&audit));
    let counters = Arc::<Counters>::default();
    let metrics = Metrics {
        inference_seconds: counters.inference_seconds.clone(),
        ..Metrics::default()
    };
    let node = Arc::new(NodeState {
        spool,
        config,
        intake,
        store,
        outbox,
        counters,
        model: watch::Sender::default(),
        changed: broadcast::Sender::new(CHANGES),
        stopping,
        started: Instant::now(),
        metrics,
        page_changed,
        slices: page::slices::Slices::default(),
        audit,
        models,
    });
    let accepting = listener.run(Arc::clone(&node.intake), node.stopping.clone());
    let listening = tokio::spawn(vital::task("listener", accepting));
    start_retention_and_folder(&node);
    start_page(&node, page_listener, page_settings);
    tokio::spawn(operate::systemd::feed(
        node.stopping.clone(),
        work_of(&node),
    ));
    operate::systemd::ready(&format!("listening on {dicom_address}"));
    tracing::info!(%dicom_address, ae_title = %node.config.borrow().ae_title, "listening");
    let watching = operate::watch::start(&node);
    let started = start_sending_and_deciding(&node).await;
    let (sending, deciding) = started.inspect_err(|_| {
        // What runs by now looks at this alone; the process ends when it has ended.
        stop.send_replace(true);
    })?;
    operate::watch::started(&node);
    while let Asked::Reload = signals.next().await {
        operate::systemd::reloading();
        let is_in_force = reload_config(path.as_deref(), &reload, &tls, &node);
        operate::watch::note(&node, &Event::Reloaded { is_in_force });
        operate::systemd::ready(&format!("listening on {dicom_address}"));
    }
    operate::systemd::stopping();
    tracing::info!("stopping");
    stop.send_replace(true);
    ended(listening).await?;
    ended(tokio::task::spawn_blocking(move || deciding.stop())).await?;
    ended(sending).await?;
    operate::watch::stopped(&node, watching).await;
    let counts = node.spool.counts();
    tracing::info!(objects = counts.objects, "stopped");
    Ok(Exit::Ok)
}

/// Starts what sends results and what makes them.
async fn start_sending_and_deciding(
    node: &Arc<NodeState>,
) -> Result<(JoinHandle<()>, decide::Deciding), Failure> {
    let sending = send::node::start(node)?;
    commitment::node::start(node);
    Ok((sending, decide::node::start(node).await?))
}

/// Waits for a part to end by itself.
async fn ended<T>(part: JoinHandle<T>) -> Result<T, Failure> {
    part.await
        .map_err(|error| failure(Exit::Unavailable)(anyhow!(error)))
}

/// Starts the page.
fn start_page(node: &Arc<NodeState>, listener: TcpListener, settings: page::Settings) {
    let settings = page::node::follow_settings(node, settings);
    let router = page::routes::router(page::node::sources(node), settings);
    let serving = page::server::run(listener, router, node.stopping.clone());
    tokio::spawn(vital::task("page", serving));
}

/// Starts what deletes, and what takes files.
fn start_retention_and_folder(node: &Arc<NodeState>) {
    let deleting = retention::run(Arc::clone(&node.intake), node.stopping.clone());
    tokio::spawn(vital::task("retention", deleting));
    let (intake, stopping) = (Arc::clone(&node.intake), node.stopping.clone());
    let runtime = tokio::runtime::Handle::current();
    let taking = move || watch_folder::run(&intake, &runtime, &stopping);
    tokio::task::spawn_blocking(move || vital::work("watch folder", taking));
}

fn load_tls(config: &Config) -> Result<Option<tls::Identity>, Failure> {
    let identity = config.tls.as_ref().map(tls::load).transpose();
    identity
        .context("[tls]")
        .map_err(failure(Exit::Configuration))
}

/// Binds the DICOM port. Out: with the address that it has.
fn dicom_listener(config: &Config) -> Result<(Listener, SocketAddr), Failure> {
    let address = SocketAddr::new(config.dicom_bind, config.dicom_port);
    let listener = Listener::bind(address)
        .with_context(|| format!("DICOM port {address}"))
        .map_err(failure(Exit::Unavailable))?;
    let address = listener.address().map_err(failure(Exit::Unavailable))?;
    Ok((listener, address))
}

/// Binds the page's address, before anything is told to be ready.
async fn page_listener(config: &Config) -> Result<(TcpListener, page::Settings), Failure> {
    let settings = page::node::settings(config).map_err(failure(Exit::Configuration))?;
    let listener = TcpListener::bind(config.http_bind)
        .await
        .with_context(|| format!("page on {}", config.http_bind))
        .map_err(failure(Exit::Unavailable))?;
    if let Ok(http_address) = listener.local_addr() {
        tracing::info!(%http_address, "page");
    }
    Ok((listener, settings))
}

/// What waits and what is finished, for the watchdog.
fn work_of(node: &Arc<NodeState>) -> impl Fn() -> (u64, u64) + Send + 'static {
    let node = Arc::clone(node);
    move || {
        let counts = node.counters.counts();
        let waiting = node.spool.latest().borrow().saturating_sub(counts.cursor);
        let finished = counts.n_analysed + counts.n_not_analysed + counts.cursor;
        (waiting, finished)
    }
}

/// Root would leave files behind that the daemon's own user could not open at its next start.
fn refuse_root_in_foreign_folder(state_dir: &Path) -> Result<(), Failure> {
    let Ok(folder) = std::fs::metadata(state_dir) else {
        return Ok(());
    };
    if rustix::process::geteuid().is_root() && folder.uid() != 0 {
        let error = anyhow!(
            "state folder {} belongs to user {}: start the node as that user, for example by systemctl start edge",
            state_dir.display(),
            folder.uid()
        );
        return Err(failure(Exit::CannotWrite)(error));
    }
    Ok(())
}

fn open_spool(config: &Config) -> Result<Arc<Spool>, Failure> {
    refuse_root_in_foreign_folder(&config.state_dir)?;
    let folder = config.state_dir.join("spool");
    Spool::open(&folder, &spool_limits(config)).map_err(|error| {
        let exit = match error {
            SpoolError::InUse(_) => Exit::Unavailable,
            _ => Exit::CannotWrite,
        };
        failure(exit)(
            anyhow!(error).context(format!("state folder {}", config.state_dir.display())),
        )
    })
}

fn spool_limits(config: &Config) -> SpoolLimits {
    SpoolLimits {
        quota_bytes: config.retention.quota_bytes,
        keep_free_bytes: config.retention.keep_free_bytes,
        max_object_bytes: config.limits.max_object_bytes,
        ..SpoolLimits::default()
    }
}

/// Reads the file again. One with faults changes nothing; what cannot change while the node runs stays and is named.
fn reload_config(
    path: Option<&Path>,
    reload: &watch::Sender<Arc<Config>>,
    tls: &watch::Sender<Option<tls::Identity>>,
    node: &NodeState,
) -> bool {
    let loaded = load(path).and_then(|config| Ok((load_tls(&config)?, config)));
    let (identity, mut config) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            tracing::error!(%error, "configuration not reloaded");
            return false;
        }
    };
    let old = Arc::clone(&reload.borrow());
    let is_fixed_changed = (
        &config.state_dir,
        config.dicom_bind,
        config.dicom_port,
        config.http_bind,
    ) != (
        &old.state_dir,
        old.dicom_bind,
        old.dicom_port,
        old.http_bind,
    );
    if is_fixed_changed {
        tracing::warn!(
            "state_dir, dicom_bind, dicom_port and http_bind change only with a restart"
        );
        config.state_dir.clone_from(&old.state_dir);
        config.dicom_bind = old.dicom_bind;
        config.dicom_port = old.dicom_port;
        config.http_bind = old.http_bind;
    }
    node.spool.set_limits(spool_limits(&config));
    tls.send_replace(identity);
    reload.send_replace(Arc::new(config));
    tracing::info!("configuration reloaded");
    true
}

/// What the operator asks for.
enum Asked {
    Reload,
    Stop,
}

struct Signals {
    reload: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            reload: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.reload.recv() => Asked::Reload,
        }
    }
}
