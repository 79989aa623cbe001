//! Reads /proc/self/mountinfo (proc(5)): no call into any file system, so no hang on a dead one.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mounted {
    /// major:minor of the device, as in /sys/class/bdi.
    pub(crate) device: String,
    pub(crate) kind: String,
    pub(crate) source: String,
}

/// The topmost mount at exactly this (absolute) path.
pub(crate) fn at(path: &Path) -> Option<Mounted> {
    let text = std::fs::read("/proc/self/mountinfo").ok()?;
    find(&text, path.as_os_str().as_bytes())
}

fn find(text: &[u8], path: &[u8]) -> Option<Mounted> {
    let mut found = None;
    for line in text.split(|b| *b == b'\n') {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        let Some(dash) = fields.iter().position(|f| *f == b"-") else { continue };
        let (Some(device), Some(point)) = (fields.get(2), fields.get(4)) else { continue };
        let (Some(kind), Some(source)) = (fields.get(dash + 1), fields.get(dash + 2)) else {
            continue;
        };
        if unescape(point) == path {
            let text = |f: &[u8]| String::from_utf8_lossy(&unescape(f)).into_owned();
            found = Some(Mounted { device: text(device), kind: text(kind), source: text(source) });
        }
    }
    found
}

/// Blanks, tabs, newlines and backslashes are octal escapes there.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut i = 0;
    while i < field.len() {
        let digits = field.get(i + 1..i + 4);
        match (field[i], digits) {
            (b'\\', Some(d)) if d.iter().all(|c| (b'0'..=b'7').contains(c)) => {
                let value = d.iter().fold(0u32, |v, c| v * 8 + u32::from(c - b'0'));
                out.push(value as u8);
                i += 4;
            }
            (byte, _) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_of_a_path_is_found() {
        let text = b"22 1 8:1 / / rw - ext4 /dev/sda rw\n\
            40 22 0:35 / /mnt/a\\040b rw,nodev shared:1 - fuse.ebb ebb rw\n\
            41 40 0:36 / /mnt/a\\040b rw - tmpfs tmpfs rw\n";
        let m = find(text, b"/mnt/a b").expect("there");
        assert_eq!((m.device.as_str(), m.kind.as_str()), ("0:36", "tmpfs"));
        assert_eq!(find(text, b"/mnt"), None);
        assert_eq!(find(b"garbage\n\n", b"/"), None);
    }
}
