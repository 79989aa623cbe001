//! Extended attributes: what names and values there may be, and their text, which is how they travel in an object's
//! metadata and in a dump (docs/SEMANTICS.md).
//!
//! All attributes of a file are one text of printable ASCII: `name=value` or `name:base64`, in the order of their names,
//! with commas between. Names and plain values have every byte that is not printable ASCII, and each of `%,=:?"\`, as
//! `%` and two hexadecimal digits; a value is in base64 (standard alphabet, no padding) where that is shorter.

use crate::{FsError, FsResult};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use rkyv::{Archive, Deserialize, Serialize};

/// The attributes of a file: names and values, in the order of the names.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Bytes of a name at most, as Linux has it.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// Bytes of a value at most, as Linux has it. All of a file's have less room: [`XATTRS_TEXT_BYTES_MAX`].
pub const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;
/// Bytes of the text of all attributes of a file at most. With everything else that an object's metadata says, at its
/// longest, and the names of the headers, it stays below the 2,048 bytes that S3 gives it.
pub const XATTRS_TEXT_BYTES_MAX: usize = 1_500;

/// What a new value does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum XattrMode {
    /// It replaces the old one, if there is one.
    Any,
    /// XATTR_CREATE: there must be none.
    Create,
    /// XATTR_REPLACE: there must be one.
    Replace,
}

/// Whether there may be an attribute of this name: EINVAL, ERANGE or EOPNOTSUPP if not.
pub fn check_name(name: &[u8]) -> FsResult<()> {
    if name.is_empty() || name.contains(&0) {
        return Err(FsError::Invalid("an attribute needs a name, without NUL".into()));
    }
    if name.len() > XATTR_NAME_BYTES_MAX {
        return Err(FsError::AttributeNameTooLong);
    }
    let kept = [&b"user."[..], b"trusted.", b"security."];
    match kept.iter().any(|space| name.starts_with(space) && name.len() > space.len()) {
        true => Ok(()),
        // POSIX ACLs among them: nothing here would enforce them.
        false => Err(FsError::NotSupported(
            "extended attributes are in user., trusted. or security.".into(),
        )),
    }
}

/// Changes one attribute: `value` `None` removes it. Refused, it changes nothing.
pub fn change(
    xattrs: &mut Xattrs,
    name: &[u8],
    value: Option<&[u8]>,
    how: XattrMode,
) -> FsResult<()> {
    check_name(name)?;
    let at = xattrs.binary_search_by(|(n, _)| n.as_slice().cmp(name));
    let Some(value) = value else {
        xattrs.remove(at.map_err(|_| FsError::NoAttribute)?);
        return Ok(());
    };
    if value.len() > XATTR_VALUE_BYTES_MAX {
        return Err(FsError::AttributeTooLarge);
    }
    let mut next = xattrs.clone();
    match (at, how) {
        (Ok(_), XattrMode::Create) => return Err(FsError::Exists),
        (Err(_), XattrMode::Replace) => return Err(FsError::NoAttribute),
        (Ok(at), _) => value.clone_into(&mut next[at].1),
        (Err(at), _) => next.insert(at, (name.to_vec(), value.to_vec())),
    }
    if text_bytes(&next) > XATTRS_TEXT_BYTES_MAX {
        return Err(FsError::NoSpace);
    }
    *xattrs = next;
    Ok(())
}

/// Bytes of [`text`].
pub fn text_bytes(xattrs: &Xattrs) -> usize {
    let items: usize = xattrs.iter().map(|(name, value)| item_bytes(name, value) + 1).sum();
    items.saturating_sub(1)
}

/// The text of a file's attributes.
pub fn text(xattrs: &Xattrs) -> String {
    let mut text = String::with_capacity(text_bytes(xattrs));
    for (name, value) in xattrs {
        if !text.is_empty() {
            text.push(',');
        }
        push_plain(&mut text, name);
        if is_shorter_in_base64(value) {
            text.push(':');
            BASE64.encode_string(value, &mut text);
        } else {
            text.push('=');
            push_plain(&mut text, value);
        }
    }
    text
}

/// What a text says. `None`: it is none of ours, or longer than ours may be; then it says nothing.
pub fn of_text(text: &str) -> Option<Xattrs> {
    if text.len() > XATTRS_TEXT_BYTES_MAX {
        return None;
    }
    let mut xattrs = Xattrs::new();
    for item in text.split(',').filter(|_| !text.is_empty()) {
        let at = item.find(['=', ':'])?;
        let (name, value) = (plain(&item[..at])?, &item[at + 1..]);
        let value = match item.as_bytes()[at] {
            b':' => BASE64.decode(value).ok()?,
            _ => plain(value)?,
        };
        check_name(&name).ok()?;
        xattrs.push((name, value));
    }
    xattrs.sort_unstable();
    let is_unique = xattrs.windows(2).all(|two| two[0].0 != two[1].0);
    is_unique.then_some(xattrs)
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !b"%,=:?\"\\".contains(&byte)
}

fn plain_bytes(bytes: &[u8]) -> usize {
    bytes.iter().map(|&b| if is_plain(b) { 1 } else { 3 }).sum()
}

fn base64_bytes(bytes: &[u8]) -> usize {
    (bytes.len() * 4).div_ceil(3)
}

fn is_shorter_in_base64(value: &[u8]) -> bool {
    base64_bytes(value) < plain_bytes(value)
}

fn item_bytes(name: &[u8], value: &[u8]) -> usize {
    plain_bytes(name) + 1 + base64_bytes(value).min(plain_bytes(value))
}

fn push_plain(text: &mut String, bytes: &[u8]) {
    for &byte in bytes {
        if is_plain(byte) {
            text.push(char::from(byte));
        } else {
            text.push('%');
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from(b"0123456789ABCDEF"[usize::from(digit)]));
            }
        }
    }
}

fn plain(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            is_plain(byte).then(|| bytes.push(byte))?;
            continue;
        }
        let (two, after) = rest.split_at_checked(2)?;
        let digit = |d: u8| char::from(d).to_digit(16).map(|d| d as u8);
        bytes.push(digit(two[0])? << 4 | digit(two[1])?);
        rest = after;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// The seed is in the failure's text.
    struct Random(StdRng);
    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0.random_range(0..n)
        }
        fn bytes(&mut self, most: u64, binary: bool) -> Vec<u8> {
            let n = self.below(most + 1);
            let byte = |r: &mut Self| if binary { r.below(256) } else { 0x20 + r.below(0x5f) };
            (0..n).map(|_| byte(self) as u8).collect()
        }
        fn name(&mut self) -> Vec<u8> {
            let space = [&b"user."[..], b"trusted.", b"security."][self.below(3) as usize];
            let binary = self.below(2) == 0;
            let rest = self.bytes(20, binary).into_iter().filter(|b| *b != 0);
            [space, b"n"].concat().into_iter().chain(rest).collect()
        }
    }

    fn set(xattrs: &mut Xattrs, name: &[u8], value: &[u8]) -> FsResult<()> {
        change(xattrs, name, Some(value), XattrMode::Any)
    }

    /// Random changes, against a map; the text has the length that was reckoned, is what a header can carry, and
    /// says the same.
    #[test]
    fn attributes_survive_their_text() {
        let mut refused = 0;
        for seed in 1..=500u64 {
            let mut random = Random(StdRng::seed_from_u64(seed));
            let (mut xattrs, mut model) = (Xattrs::new(), std::collections::BTreeMap::new());
            for _ in 0..40 {
                let known = random.below(model.len() as u64 + 1) as usize;
                let name = model.keys().nth(known).cloned().unwrap_or_else(|| random.name());
                if random.below(4) == 0 {
                    let gone = change(&mut xattrs, &name, None, XattrMode::Any);
                    let was = model.remove(&name).ok_or(FsError::NoAttribute);
                    assert_eq!(gone, was.map(drop), "seed {seed}");
                } else {
                    let most = [8, 900][random.below(2) as usize];
                    let binary = random.below(2) == 0;
                    let value = random.bytes(most, binary);
                    let mut next = model.clone();
                    next.insert(name.clone(), value.clone());
                    let fits = text(&next.clone().into_iter().collect()).len();
                    if fits <= XATTRS_TEXT_BYTES_MAX {
                        set(&mut xattrs, &name, &value).expect("fits");
                        model = next;
                    } else {
                        assert_eq!(set(&mut xattrs, &name, &value), Err(FsError::NoSpace));
                        refused += 1;
                    }
                }
                assert_eq!(xattrs, model.clone().into_iter().collect::<Xattrs>(), "seed {seed}");
                let text = text(&xattrs);
                assert_eq!(text.len(), text_bytes(&xattrs), "seed {seed}: {text}");
                assert!(text.bytes().all(|b| b.is_ascii_graphic()), "seed {seed}: {text}");
                assert_eq!(of_text(&text), Some(xattrs.clone()), "seed {seed}: {text}");
            }
        }
        assert!(refused > 100, "the limit was met");
    }

    /// A text with random bytes in it is read, or refused; what is read is within every limit.
    #[test]
    fn whatever_a_stranger_writes_is_within_the_limits() {
        let mut read = 0;
        for seed in 1..=20_000u64 {
            let mut random = Random(StdRng::seed_from_u64(seed));
            let mut xattrs = Xattrs::new();
            for _ in 0..random.below(4) {
                let (name, binary) = (random.name(), random.below(2) == 0);
                let value = random.bytes(20, binary);
                set(&mut xattrs, &name, &value).expect("fits");
            }
            let mut bytes = text(&xattrs).into_bytes();
            for _ in 0..random.below(3) {
                let at = random.below(bytes.len() as u64 + 1) as usize;
                let byte = b"%,=:?A9z \xff"[random.below(10) as usize];
                match random.below(3) {
                    0 => bytes.insert(at, byte),
                    1 if at < bytes.len() => bytes[at] = byte,
                    _ => bytes.truncate(at),
                }
            }
            let Some(found) = of_text(&String::from_utf8_lossy(&bytes)) else { continue };
            read += 1;
            assert!(found.is_sorted() && text_bytes(&found) <= bytes.len(), "seed {seed}");
            assert_eq!(of_text(&text(&found)), Some(found), "seed {seed}");
        }
        assert!(read > 5_000, "{read}");
    }

    #[test]
    fn the_form_is_as_documented() {
        let mut xattrs = Xattrs::new();
        set(&mut xattrs, b"user.note", b"100% \xc3\xa4").expect("set");
        set(&mut xattrs, b"user.empty", b"").expect("set");
        set(&mut xattrs, b"user.a=b", b"xxxx,y").expect("set");
        set(&mut xattrs, b"security.capability", &[0, 1, 2, 0xff]).expect("set");
        let expected =
            "security.capability:AAEC/w,user.a%3Db=xxxx%2Cy,user.empty=,user.note:MTAwJSDDpA";
        assert_eq!(text(&xattrs), expected);
    }

    #[test]
    fn what_is_not_ours_says_nothing() {
        for bad in [
            ",",
            "user.a",
            "user.a=1,",
            "user.a=%",
            "user.a=%4",
            "user.a=%zz",
            "user.a=a b",
            "user.a:====",
            "user.a:A",
            "user.a=1,user.a=2",
            "system.posix_acl_access=x",
            "user.=x",
            "%00=x",
            "user.%00=x",
            "user.ä=x",
        ] {
            assert_eq!(of_text(bad), None, "{bad}");
        }
        assert_eq!(of_text(""), Some(Xattrs::new()));
        let long = format!("user.a={}", "x".repeat(XATTRS_TEXT_BYTES_MAX));
        assert_eq!(of_text(&long), None, "longer than any of ours");
    }

    #[test]
    fn limits_are_linuxs() {
        let mut xattrs = Xattrs::new();
        let long = [b"user.", "n".repeat(251).as_bytes()].concat();
        assert_eq!(set(&mut xattrs, &long, b"v"), Err(FsError::AttributeNameTooLong));
        set(&mut xattrs, &long[..255], b"v").expect("of 255 bytes");
        let errno = |r: FsResult<()>| r.map_err(|e| e.errno());
        assert_eq!(errno(set(&mut xattrs, b"", b"v")), Err(22));
        assert_eq!(errno(set(&mut xattrs, b"system.posix_acl_access", b"v")), Err(95));
        assert_eq!(errno(set(&mut xattrs, b"user.big", &vec![0; 65_537])), Err(7));
        assert_eq!(errno(set(&mut xattrs, b"user.big", &vec![0; 65_536])), Err(28));
        assert_eq!(errno(change(&mut xattrs, b"user.b", None, XattrMode::Any)), Err(61));
        assert_eq!(xattrs.len(), 1);
    }
}
