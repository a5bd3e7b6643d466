//! Sending within the node: what of the configuration it is given, when it is woken, what it tells the metrics.
//!
//! In: the configuration and the results database. Out: the running sender. A configuration that is read again is used from the next letter on
//! and has dead letters sent again; one whose files cannot be read changes nothing.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use jiff::tz::TimeZone;
use shared::uid::Uid;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;

use super::back_off::Patience;
use super::connection::Connection;
use super::data_set::DataSet;
use super::delivery::{Delivery, End, Ways};
use super::equipment::Device;
use super::hl7::Hl7;
use super::http;
use super::letter::NotMade;
use super::outbox::{Bounds, Channel, Counts, Letter, Outbox};
use super::pacs::Pacs;
use super::secondary_capture::{self, KeySlice};
use super::stow::Stow;
use super::webhook::{Secret, Webhook};
use crate::config::Config;
use crate::decide::Changed;
use crate::decide::store::Store;
use crate::exit::{Exit, Failure, failure, said};
use crate::heatmap;
use crate::intake::tls;
use crate::operate::audit::Event;
use crate::operate::metrics::{self, DeliveryChannel, DeliveryEnd};
use crate::operate::status::GivenUp;
use crate::operate::watch;
use crate::page::NotShown;
use crate::result::StudyResult;
use crate::serve::NodeState;
use crate::vital;

/// The system's time zone.
const LOCAL_TIME: &str = "/etc/localtime";
/// Largest time zone, secret, token or certificate file.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most results given up that the page names.
const MAX_GIVEN_UP: usize = 20;
/// How often old letters and ended commitments are deleted.
const FORGET_EVERY: Duration = Duration::from_secs(1800);

/// Opens the outbox in the results database.
///
/// # Errors
/// `CannotWrite` where the medium fails.
pub(crate) fn open_outbox(store: &Store) -> Result<Arc<Outbox>, Failure> {
    let outbox = Outbox::open(store.database()).map_err(failure(Exit::CannotWrite))?;
    Ok(Arc::new(outbox))
}

/// Starts to send.
///
/// # Errors
/// `Configuration` where a file that the configuration names cannot be read; `CannotWrite` where the medium fails.
pub(crate) fn start(node: &Arc<NodeState>) -> Result<JoinHandle<()>, Failure> {
    let device = device(node).map_err(failure(Exit::CannotWrite))?;
    let config = Arc::clone(&node.config.borrow());
    let ways = ways(&config, &device).map_err(failure(Exit::Configuration))?;
    let (observed, drawing) = (Arc::clone(node), Arc::clone(node));
    let delivery = Delivery::new(
        Arc::clone(&node.outbox),
        ways,
        Arc::new(move |result, device| draw(&drawing, result, device)),
        Box::new(move |letter, end| count(&observed, letter, end)),
        Bounds::default(),
    );
    // Before anything is decided: what changes from here on is heard.
    let changes = node.changed.subscribe();
    tokio::spawn(vital::task(
        "outbox",
        ring(Arc::clone(&node.outbox), changes),
    ));
    tokio::spawn(vital::task("outbox", forget(Arc::clone(node))));
    let configuring = reconfigure(Arc::clone(node), Arc::clone(&delivery), device);
    tokio::spawn(vital::task("outbox", configuring));
    Ok(tokio::spawn(delivery.run(node.stopping.clone())))
}

/// How many letters wait and how many are dead; none where the outbox cannot be read, which is logged.
pub(crate) fn counts(outbox: &Outbox) -> Counts {
    outbox.counts().unwrap_or_else(|error| {
        tracing::error!(%error, "the outbox cannot be read");
        Counts::default()
    })
}

/// The results given up last; none where the outbox cannot be read, which [`counts`] logs.
pub(crate) fn given_up(outbox: &Outbox) -> Vec<GivenUp> {
    let letters = outbox.dead_letters(MAX_GIVEN_UP).unwrap_or_default();
    let shown = letters.into_iter().map(|letter| GivenUp {
        study_uid: letter.study_uid.to_string(),
        channel: letter.channel.name().to_owned(),
        ended_ms: letter.ended_ms.unwrap_or_default(),
        reason: letter.remark.unwrap_or_default(),
    });
    shown.collect()
}

/// Whatever changed may have put a letter into the outbox.
async fn ring(outbox: Arc<Outbox>, mut changes: Receiver<Changed>) {
    loop {
        match changes.recv().await {
            Ok(_) | Err(RecvError::Lagged(_)) => outbox.bell.notify_waiters(),
            Err(RecvError::Closed) => return,
        }
    }
}

/// Deletes by age, unless the clock may be wrong.
async fn forget(node: Arc<NodeState>) {
    loop {
        tokio::time::sleep(FORGET_EVERY).await;
        let retention = node.config.borrow().retention.clone();
        let Some(ages) = node.intake.clock.ages(&retention) else {
            continue;
        };
        let outbox = Arc::clone(&node.outbox);
        let asked = Arc::clone(&node.intake.commitments.asked);
        let promised = Arc::clone(&node.intake.commitments.promised);
        let forget = move || {
            asked.forget(ages)?;
            promised.forget(ages)?;
            outbox.forget(ages)
        };
        let lost = tokio::task::spawn_blocking(forget).await;
        match lost {
            Ok(Ok(lost)) => node.outbox.lose(lost),
            Ok(Err(error)) => tracing::error!(%error, "the outbox cannot be written"),
            Err(error) => tracing::error!(%error, "deleting old letters failed"),
        }
    }
}

async fn reconfigure(node: Arc<NodeState>, delivery: Arc<Delivery>, device: Device) {
    let mut config = node.config.clone();
    while config.changed().await.is_ok() {
        let config = Arc::clone(&config.borrow_and_update());
        match ways(&config, &device) {
            Ok(ways) => {
                delivery.configure(ways);
                revive(&node).await;
            }
            Err(error) => tracing::error!(error = said(&error), "receivers not changed"),
        }
    }
}

/// What a receiver refused may be taken now that the operator has changed something.
async fn revive(node: &NodeState) {
    let outbox = Arc::clone(&node.outbox);
    match tokio::task::spawn_blocking(move || outbox.revive()).await {
        Ok(Ok(0)) => {}
        Ok(Ok(revived)) => tracing::info!(revived, "dead letters are sent again"),
        Ok(Err(error)) => tracing::error!(%error, "the outbox cannot be written"),
        Err(error) => tracing::error!(%error, "reviving dead letters failed"),
    }
}

fn count(node: &NodeState, letter: &Letter, end: End) {
    let channel = match letter.channel {
        Channel::StructuredReport => DeliveryChannel::structured_report,
        Channel::SecondaryCapture => DeliveryChannel::secondary_capture,
        Channel::Webhook => DeliveryChannel::webhook,
        Channel::Hl7 => DeliveryChannel::hl7,
        Channel::Stow => DeliveryChannel::stow,
    };
    let how = match end {
        End::Delivered => DeliveryEnd::delivered,
        End::Retried => DeliveryEnd::retried,
        End::Dead => DeliveryEnd::dead,
    };
    let delivery = metrics::Delivery { channel, how };
    node.metrics.deliveries.get_or_create(&delivery).inc();
    if end != End::Retried {
        let event = Event::Delivered {
            study_uid: &letter.study_uid,
            revision: letter.revision,
            channel: letter.channel.name(),
            how: if end == End::Delivered {
                "delivered"
            } else {
                "dead"
            },
        };
        watch::note(node, &event);
    }
    // An error means that nobody watches.
    drop(node.page_changed.send(()));
}

/// The capture, its slices read again from the spool by the page's worker: deciding is not held up.
fn draw(node: &NodeState, result: &StudyResult, device: &Device) -> Result<DataSet, NotMade> {
    let mut slices = Vec::new();
    for slice in secondary_capture::key_slices(result) {
        match node.slices.read(&node.spool, slice, true) {
            Ok(shown) => slices.push(KeySlice {
                slice,
                picture: heatmap::drawn(
                    &shown.tensor,
                    heatmap::SHOWN_CHANNEL,
                    shown.contributions.as_ref(),
                ),
            }),
            // What retention has deleted or the worker cannot read again is left out.
            Err(NotShown::Purged | NotShown::Refused(_)) => {}
            Err(busy @ NotShown::Busy) => return Err(NotMade::Later(busy.to_string())),
        }
    }
    Ok(secondary_capture::capture(result, device, &slices))
}

/// This installation: a random UUID that is made once and kept beside the results.
fn device(node: &NodeState) -> anyhow::Result<Device> {
    let mut random = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .context("/dev/urandom")?;
    // RFC 9562 section 5.4: version 4.
    let uuid = u128::from_be_bytes(random) & !(0xF << 76 | 0b11 << 62) | 4 << 76 | 0b10 << 62;
    let uuid = node.outbox.installation(uuid)?;
    let uid = Uid::new(&format!("2.25.{uuid}")).map_err(|error| anyhow!(error))?;
    Ok(Device {
        uid,
        serial: format!("{uuid:032x}")[..12].to_owned(),
        station: node.config.borrow().ae_title.clone(),
        time_zone: time_zone(),
    })
}

/// The system's time zone; UTC where it has none.
fn time_zone() -> TimeZone {
    let read = bounded(Path::new(LOCAL_TIME)).ok();
    let zone = read.and_then(|bytes| TimeZone::tzif("local", &bytes).ok());
    zone.unwrap_or(TimeZone::UTC)
}

/// The receivers of a configuration.
pub(crate) fn ways(config: &Config, device: &Device) -> anyhow::Result<Ways> {
    let identity = config.tls.as_ref().map(tls::load).transpose();
    let identity = identity.context("[tls]")?;
    let client = |is_spoken: bool| {
        let identity = identity.as_ref().filter(|_| is_spoken);
        identity.map(|identity| Arc::clone(&identity.client))
    };
    let pacs = config.pacs.as_ref();
    let pacs = pacs.map(|pacs| Pacs::configured(config, pacs, client(pacs.tls)));
    let webhook = config.webhook.as_ref().map(|webhook| {
        Ok::<_, anyhow::Error>(Webhook {
            url: webhook.url.clone(),
            secret: secret(&webhook.secret_file)?,
            agent: http::agent(),
        })
    });
    let stow = config.stow.as_ref().map(|stow| {
        Ok::<_, anyhow::Error>(Stow {
            url: stow.url.clone(),
            token: stow.token_file.as_deref().map(secret).transpose()?,
            agent: http::agent(),
        })
    });
    Ok(Ways {
        pacs,
        webhook: webhook.transpose().context("[webhook] secret_file")?,
        hl7: config.hl7.as_ref().map(|hl7| Hl7 {
            connection: Connection {
                host: hl7.host.clone(),
                port: hl7.port,
                tls: client(hl7.tls),
            },
            sending_facility: hl7.sending_facility.clone(),
            receiving_application: hl7.receiving_application.clone(),
            receiving_facility: hl7.receiving_facility.clone(),
        }),
        stow: stow.transpose().context("[stow] token_file")?,
        device: Device {
            station: config.ae_title.clone(),
            ..device.clone()
        },
        patience: Patience::default(),
    })
}

/// What is wrong with the secrets' files that the configuration names.
pub(crate) fn faults_of_secrets(config: &Config) -> Vec<anyhow::Error> {
    let webhook = config.webhook.as_ref().map(|webhook| &webhook.secret_file);
    let stow = config
        .stow
        .as_ref()
        .and_then(|stow| stow.token_file.as_ref());
    let files = [
        ("[webhook] secret_file", webhook),
        ("[stow] token_file", stow),
    ];
    let read = files
        .into_iter()
        .filter_map(|(name, path)| Some(secret(path?).err()?.context(name)));
    read.collect()
}

/// A secret, white space at its end taken off.
fn secret(path: &Path) -> anyhow::Result<Secret> {
    let bytes = bounded(path).with_context(|| path.display().to_string())?;
    let bytes = bytes.trim_ascii_end();
    if bytes.is_empty() {
        return Err(anyhow!("{}: the file is empty", path.display()));
    }
    Ok(Secret(bytes.to_vec()))
}

fn bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?
        .take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}
