//! The memory that this machine or container has left.

use std::{fs::read_to_string, path::Path};

/// Bytes of memory that can be taken: of the machine, and of the container's limit (cgroup v2) if it has one. `None` where
/// the kernel does not say.
pub fn available() -> Option<u64> {
    let machine = of_machine(&read_to_string("/proc/meminfo").ok()?)?;
    Some(of_container(Path::new("/sys/fs/cgroup")).map_or(machine, |container| container.min(machine)))
}

fn of_machine(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// What is left below the limit; the page cache counts as left, as far as it can be dropped.
fn of_container(cgroup: &Path) -> Option<u64> {
    let number = |name: &str| read_to_string(cgroup.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (number("memory.max")?, number("memory.current")?);
    let statistics = read_to_string(cgroup.join("memory.stat")).ok()?;
    let cache = statistics.lines().find_map(|line| line.strip_prefix("inactive_file "))?.parse::<u64>().ok()?;
    Some(limit.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_what_the_kernel_says() {
        let text = "MemTotal:       16331752 kB\nMemFree:         812 kB\nMemAvailable:   9000000 kB\n";
        assert_eq!(of_machine(text), Some(9_000_000 << 10));
        assert_eq!(of_machine("MemTotal: 1 kB\n"), None);
        assert!(available().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn a_container_has_what_its_limit_leaves() {
        let cgroup = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(cgroup.path().join(name), text).unwrap();
        assert_eq!(of_container(cgroup.path()), None);
        write("memory.current", "3000\n");
        write("memory.stat", "anon 1000\ninactive_file 500\nactive_file 7\n");
        write("memory.max", "max\n");
        assert_eq!(of_container(cgroup.path()), None, "no limit");
        write("memory.max", "10000\n");
        assert_eq!(of_container(cgroup.path()), Some(7500));
        write("memory.max", "2000\n");
        assert_eq!(of_container(cgroup.path()), Some(0));
    }
}
