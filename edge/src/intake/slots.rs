//! Who has how many associations: places, overall and by address, with some kept for listed peers that have none.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::Limits;

/// Who has how many associations.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
    by_title: HashMap<String, usize>,
}

/// One association's place; given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    open: Arc<Mutex<Open>>,
    address: IpAddr,
    title: String,
}

impl Slots {
    /// Associations that are open.
    pub(crate) fn open(&self) -> usize {
        lock(&self.open).total
    }

    /// Takes a place; `None` where a cap is reached. While peers are listed, the last `kept_for_listed` places go only to a peer
    /// that has none, so that one console with many associations locks nobody out.
    pub(super) fn take(
        &self,
        address: IpAddr,
        title: &str,
        is_listed: bool,
        limits: &Limits,
    ) -> Option<Slot> {
        let mut open = lock(&self.open);
        let of_title = open.by_title.get(title).copied().unwrap_or(0);
        let most = if is_listed && of_title > 0 {
            limits
                .max_associations
                .saturating_sub(limits.kept_for_listed)
        } else {
            limits.max_associations
        };
        let of_address = open.by_address.get(&address).copied().unwrap_or(0);
        let is_first_of_listed = is_listed && of_title == 0;
        if open.total >= most || (of_address >= limits.max_per_address && !is_first_of_listed) {
            return None;
        }
        open.total += 1;
        *open.by_address.entry(address).or_default() += 1;
        *open.by_title.entry(title.to_owned()).or_default() += 1;
        Some(Slot {
            open: Arc::clone(&self.open),
            address,
            title: title.to_owned(),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        open.total = open.total.saturating_sub(1);
        if let Some(count) = open.by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&self.address);
            }
        }
        if let Some(count) = open.by_title.get_mut(&self.title) {
            *count -= 1;
            if *count == 0 {
                open.by_title.remove(&self.title);
            }
        }
    }
}

fn lock(open: &Mutex<Open>) -> std::sync::MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn place_is_given_back_by_address_and_title() {
        let config = Config::parse("", std::path::Path::new(""), Some("/state".into())).unwrap();
        let slots = Slots::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        let slot = slots.take(address, "CT1", true, &config.limits).unwrap();
        assert_eq!(slots.open(), 1);
        drop(slot);
        assert_eq!(slots.open(), 0);
        let open = lock(&slots.open);
        assert!(open.by_address.is_empty() && open.by_title.is_empty());
    }
}
