//! What the machine says of itself: temperature, size of the disk, whether its clock is plausible.
//!
//! In: files of the kernel and the file system's own figures. Out: numbers, or nothing where the machine does not say.

use std::fs;
use std::path::Path;

/// The highest temperature of the processor's zones, in degrees Celsius (Linux Documentation/ABI/testing/sysfs-class-thermal).
pub(crate) fn temperature_celsius() -> Option<f32> {
    highest(Path::new("/sys/class/thermal"))
}

fn highest(folder: &Path) -> Option<f32> {
    let zones = fs::read_dir(folder).ok()?.flatten();
    let read = |zone: fs::DirEntry| {
        let text = fs::read_to_string(zone.path().join("temp")).ok()?;
        let millidegrees: i32 = text.trim().parse().ok()?;
        #[expect(clippy::cast_precision_loss, reason = "shown in whole degrees")]
        let celsius = millidegrees as f32 / 1000.0;
        (-50.0..=200.0).contains(&celsius).then_some(celsius)
    };
    zones.filter_map(read).reduce(f32::max)
}

/// Free bytes for this user, and all bytes, of the file system that holds `path`.
pub(crate) fn disk_bytes(path: &Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Some((bytes(stat.f_bavail), bytes(stat.f_blocks)))
}

/// Whether a time can be the present.
pub(crate) fn is_clock_plausible(unix_ms: i64) -> bool {
    crate::intake::clock::is_clock_trusted(unix_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_plausible_zone_counts() {
        let folder = tempfile::tempdir().unwrap();
        for (zone, text) in [
            ("a", "48212\n"),
            ("b", "61500\n"),
            ("c", "-274000"),
            ("d", "x"),
        ] {
            fs::create_dir(folder.path().join(zone)).unwrap();
            fs::write(folder.path().join(zone).join("temp"), text).unwrap();
        }
        assert_eq!(highest(folder.path()), Some(61.5));
        assert_eq!(highest(Path::new("/nonexistent")), None);
    }

    #[test]
    fn a_board_that_woke_in_1970_is_not_believed() {
        assert!(!is_clock_plausible(86_400_000));
        assert!(is_clock_plausible(1_795_442_400_000));
    }

    #[test]
    fn a_disk_is_larger_than_its_free_part() {
        let (free, total) = disk_bytes(&std::env::temp_dir()).unwrap();
        assert!(free <= total && total > 0);
    }
}
