//! Slices for pictures: out of the spool, through a worker process of the page's own, and through the network where the heat map is asked for.
//!
//! In: a slice of a result. Out: its tensor. Foreign bytes are decoded in the worker, never here; analysis has another worker and another session of
//! the network, so that a reader who leafs through a study holds no result up. The worker is ended when nobody looks for [`REST`].

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::Session;
use shared::spec::PreprocessSpec;

use super::{NotShown, Shown};
use crate::intake::spool::{Spool, SpoolError};
use crate::model::ReadyModel;
use crate::result::SliceResult;
use crate::supervisor::{Event, Source, Stop, Supervisor, WorkerCommand};

/// How long the worker is kept for the next picture.
pub(crate) const REST: Duration = Duration::from_secs(60);

/// What reads slices; nothing before the model is known.
#[derive(Debug, Default)]
pub(crate) struct Slices(Mutex<Option<Reader>>);

#[derive(Debug)]
struct Reader {
    command: WorkerCommand,
    spec: PreprocessSpec,
    /// `None` without a sound model.
    session: Option<Session>,
    supervisor: Option<Supervisor>,
    last_used: Instant,
}

impl Slices {
    /// From now on slices are read as `model` reads them; without a sound model there are no heat maps.
    pub(crate) fn begin(&self, command: WorkerCommand, model: Option<&ReadyModel>) {
        *self.lock() = Some(Reader {
            command,
            spec: model.map_or_else(PreprocessSpec::default, |ready| {
                ready.manifest.preprocess.clone()
            }),
            session: model.map(|ready| ready.model.session()),
            supervisor: None,
            last_used: Instant::now(),
        });
    }

    /// Reads one slice, with where its answer comes from where that is asked for and known.
    ///
    /// # Errors
    /// [`NotShown`] says why there is no picture.
    pub(crate) fn read(
        &self,
        spool: &Spool,
        slice: &SliceResult,
        has_heatmap: bool,
    ) -> Result<Shown, NotShown> {
        let mut guard = self.lock();
        let reader = guard.as_mut().ok_or(NotShown::Busy)?;
        reader.last_used = Instant::now();
        let tensor = reader.tensor(spool, slice)?;
        let contributions = match &mut reader.session {
            Some(session) if has_heatmap => {
                let mut logit = [0.0];
                session
                    .logits(&tensor, &mut logit)
                    .map_err(|error| NotShown::Refused(error.to_string()))?;
                session.contributions()
            }
            _ => None,
        };
        Ok(Shown {
            tensor,
            contributions,
        })
    }

    /// Ends the worker where nobody looked for [`REST`].
    pub(crate) fn rest(&self) {
        if let Some(reader) = self.lock().as_mut()
            && reader.last_used.elapsed() >= REST
        {
            reader.supervisor = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Reader>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reader {
    fn tensor(&mut self, spool: &Spool, slice: &SliceResult) -> Result<Vec<u8>, NotShown> {
        let (file, offset, bytes) = spool.object(slice.sequence).map_err(|error| match error {
            SpoolError::Unknown(_) => NotShown::Purged,
            error => NotShown::Refused(error.to_string()),
        })?;
        let supervisor = self
            .supervisor
            .get_or_insert_with(|| Supervisor::new(self.command.clone(), &self.spec));
        let wanted = slice.frame.map_or(0, |frame| frame.saturating_sub(1));
        let mut found = Err(NotShown::Refused("the object holds no such slice".into()));
        let source = Source {
            file: &file,
            offset,
            bytes,
        };
        let mut deliver = |event| {
            match event {
                Event::Object(_) => {}
                Event::ObjectRefused(refused) => {
                    found = Err(NotShown::Refused(refused.reason.to_string()));
                }
                Event::Slice(index, Ok(tensor)) if index == wanted => {
                    found = Ok(tensor.bytes);
                    // The other frames of the object are not wanted; a worker amid them is ended.
                    return if slice.frame.is_some() {
                        Err(Stop)
                    } else {
                        Ok(())
                    };
                }
                Event::Slice(index, Err(reason)) if index == wanted => {
                    found = Err(NotShown::Refused(reason.to_string()));
                }
                Event::Slice(..) => {}
            }
            Ok(())
        };
        // Stopped is what was asked for.
        let (Ok(()) | Err(Stop)) = supervisor.analyse(source, wanted, &mut deliver);
        found
    }
}
