//! What a launcher says of this process.

use anyhow::Result;

use crate::exit::{Exit, fault};

/// Port of rank 0 where the launcher names none (torchrun's default).
pub(super) const DEFAULT_PORT: u16 = 29_500;

/// Which process of how many this is, and where rank 0 listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// From 0.
    pub rank: u32,
    /// Processes.
    pub n: u32,
    /// Host of rank 0.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl Place {
    /// Reads the launcher's variables; `None` where there is no launcher or one process alone.
    ///
    /// `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` (torchrun); else `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` (srun; a batch script
    /// itself has no step), with rank 0 expected on the node that launched the step; else `OMPI_COMM_WORLD_RANK`, `OMPI_COMM_WORLD_SIZE` (mpirun).
    /// `MASTER_ADDR` and `MASTER_PORT` count for all of them. torchrun keeps its own store on `MASTER_PORT`: the next port is used there.
    ///
    /// # Errors
    /// Variables that are no numbers, a rank outside of the number of ranks, several nodes without an address.
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<u32>> {
            let Some(text) = variable(name) else {
                return Ok(None);
            };
            let parsed = text.parse().map(Some);
            parsed.map_err(|_| fault(Exit::Usage, format!("{name}={text} is not a number")))
        };
        let mut found = None;
        for (rank, n, host) in [
            ("RANK", "WORLD_SIZE", None),
            (
                "SLURM_PROCID",
                "SLURM_STEP_NUM_TASKS",
                variable("SLURM_LAUNCH_NODE_IPADDR"),
            ),
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", {
                let local = variable("OMPI_COMM_WORLD_LOCAL_SIZE");
                (local.is_some() && local == variable("OMPI_COMM_WORLD_SIZE"))
                    .then(|| "127.0.0.1".to_owned())
            }),
        ] {
            if let (Some(rank), Some(n)) = (number(rank)?, number(n)?) {
                found = Some((rank, n, host));
                break;
            }
        }
        let Some((rank, n, host)) = found.filter(|(_, n, _)| *n != 1) else {
            return Ok(None);
        };
        if rank >= n {
            return Err(fault(
                Exit::Usage,
                format!("rank {rank} is not below the number of ranks, {n}"),
            ));
        }
        let host = variable("MASTER_ADDR").or(host).ok_or_else(|| {
            let message = format!("{n} ranks: say in MASTER_ADDR where rank 0 runs");
            fault(Exit::Usage, message)
        })?;
        let port = number("MASTER_PORT")?.map_or(Ok(DEFAULT_PORT), u16::try_from);
        let port = port.map_err(|_| fault(Exit::Usage, "MASTER_PORT is above 65535"))?;
        let is_taken = variable("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True");
        Ok(Some(Self {
            rank,
            n,
            host,
            port: port.saturating_add(u16::from(is_taken)),
        }))
    }
}
