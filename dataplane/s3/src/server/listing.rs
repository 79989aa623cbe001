//! Listing: one page of an ordered index, in S3's order and with S3's grouping. Pure.
//!
//! Keys are ordered by bytes. With a delimiter, keys that share the text up to its first
//! occurrence after the prefix become one entry, and the walk jumps over the rest of that group, so
//! that a page costs its own length and not the group's.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Included, Unbounded},
};

/// What a listing asks for.
#[derive(Debug, Clone, Default)]
pub(super) struct Query<'a> {
    pub(super) prefix: &'a str,
    /// Empty is none.
    pub(super) delimiter: &'a str,
    pub(super) after: After,
    pub(super) max: usize,
}

/// Where to go on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) enum After {
    #[default]
    Start,
    Key(String),
    /// Past everything that begins with this.
    Group(String),
}

impl After {
    /// The continuation token: opaque to clients, readable to us.
    pub(super) fn to_token(&self) -> Option<String> {
        match self {
            After::Start => None,
            After::Key(key) => Some(hex::encode(format!("k{key}"))),
            After::Group(group) => Some(hex::encode(format!("g{group}"))),
        }
    }

    pub(super) fn from_token(token: &str) -> Option<Self> {
        let text = String::from_utf8(hex::decode(token).ok()?).ok()?;
        match text.as_bytes().first()? {
            b'k' => Some(After::Key(text[1..].to_owned())),
            b'g' => Some(After::Group(text[1..].to_owned())),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Page<T> {
    pub(super) entries: Vec<(String, T)>,
    pub(super) groups: Vec<String>,
    /// Set when there is more.
    pub(super) next: Option<After>,
}

/// The least byte string above everything that begins with `prefix`. UTF-8 has no 0xFF, so the
/// last byte can always be raised.
fn past(prefix: &str) -> Option<Vec<u8>> {
    let mut bytes = prefix.as_bytes().to_vec();
    *bytes.last_mut()? += 1;
    Some(bytes)
}

/// The group a key falls into.
fn group_of<'k>(key: &'k str, query: &Query<'_>) -> Option<&'k str> {
    if query.delimiter.is_empty() {
        return None;
    }
    let rest = key.get(query.prefix.len()..)?;
    let at = rest.find(query.delimiter)?;
    key.get(..query.prefix.len() + at + query.delimiter.len())
}

/// Where a `marker` of the first listing API stands: it may name a group, which is then past.
pub(super) fn after_marker(marker: &str, prefix: &str, delimiter: &str) -> After {
    let query = Query { prefix, delimiter, ..Query::default() };
    if marker.is_empty() {
        After::Start
    } else if marker.starts_with(prefix) && group_of(marker, &query) == Some(marker) {
        After::Group(marker.to_owned())
    } else {
        After::Key(marker.to_owned())
    }
}

pub(super) fn page<T: Clone>(index: &BTreeMap<Vec<u8>, T>, query: &Query<'_>) -> Page<T> {
    let mut found = Page { entries: Vec::new(), groups: Vec::new(), next: None };
    let mut last = After::Start;
    let mut from = match &query.after {
        After::Start => Unbounded,
        After::Key(key) => Excluded(key.clone().into_bytes()),
        After::Group(group) => past(group).map_or(Unbounded, Included),
    };
    let first = Included(query.prefix.as_bytes().to_vec());
    let begins_before = match &from {
        Unbounded => true,
        Included(at) | Excluded(at) => at.as_slice() < query.prefix.as_bytes(),
    };
    if begins_before {
        from = first;
    }
    loop {
        let next = index.range((from, Unbounded)).next();
        // Keys come in as UTF-8, so this never skips one.
        let Some((key, value)) = next.and_then(|(k, v)| Some((std::str::from_utf8(k).ok()?, v)))
        else {
            return found;
        };
        if !key.starts_with(query.prefix) {
            return found;
        }
        if found.entries.len() + found.groups.len() >= query.max {
            // There is more; a page of zero entries says so to nobody.
            found.next = (query.max > 0).then_some(last);
            return found;
        }
        match group_of(key, query) {
            Some(group) => {
                found.groups.push(group.to_owned());
                last = After::Group(group.to_owned());
                from = past(group).map_or(Unbounded, Included);
            }
            None => {
                found.entries.push((key.to_owned(), value.clone()));
                last = After::Key(key.to_owned());
                from = Excluded(key.as_bytes().to_vec());
            }
        }
    }
}

/// Percent-encoding as `encoding-type=url` asks for; everything but unreserved and `/`.
pub(super) fn url_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, word by word and slowly: group, sort, cut.
    fn reference(keys: &[String], query: &Query<'_>) -> Vec<(String, bool)> {
        let mut all: Vec<(String, bool)> = Vec::new();
        for key in keys.iter().filter(|k| k.starts_with(query.prefix)) {
            let rest = &key[query.prefix.len()..];
            let entry = match rest.find(query.delimiter) {
                Some(at) if !query.delimiter.is_empty() => {
                    (key[..query.prefix.len() + at + query.delimiter.len()].to_owned(), true)
                }
                _ => (key.clone(), false),
            };
            if all.last() != Some(&entry) {
                all.push(entry);
            }
        }
        all
    }

    /// A small xorshift: the seed is in the failure's text.
    struct Random(u64);
    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
        fn text(&mut self, longest: u64) -> String {
            let alphabet = ["a", "b", "/", "//", "é", "\u{10FFFF}", "~", " "];
            (0..self.below(longest + 1)).map(|_| alphabet[self.below(8) as usize]).collect()
        }
    }

    #[test]
    fn pages_joined_are_the_whole_listing() {
        for seed in 1..=2000u64 {
            let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let index: BTreeMap<Vec<u8>, ()> = (0..random.below(40))
                .map(|_| (format!("k{}", random.text(6)).into_bytes(), ()))
                .collect();
            let keys: Vec<String> = index
                .keys()
                .map(|k| String::from_utf8(k.clone()).expect("keys are UTF-8"))
                .collect();
            let prefix = ["", "k", "ka", "k/", "ké"][random.below(5) as usize];
            let delimiter = ["", "/", "//", "é"][random.below(4) as usize];
            let max = 1 + random.below(5) as usize;
            let mut query = Query { prefix, delimiter, after: After::Start, max };
            let wanted = reference(&keys, &query);
            let mut got: Vec<(String, bool)> = Vec::new();
            let mut pages = 0;
            loop {
                let page = page(&index, &query);
                assert!(page.entries.len() + page.groups.len() <= max, "seed {seed}");
                let mut both: Vec<(String, bool)> =
                    page.entries.into_iter().map(|(k, ())| (k, false)).collect();
                both.extend(page.groups.into_iter().map(|g| (g, true)));
                both.sort();
                got.extend(both);
                pages += 1;
                assert!(pages <= keys.len() + 1, "seed {seed}: does not end");
                let Some(after) = page.next else { break };
                let token = after.to_token().expect("a token");
                query.after = After::from_token(&token).expect("our own token");
            }
            assert_eq!(got, wanted, "seed {seed} prefix {prefix:?} delimiter {delimiter:?} {max}");
        }
    }

    #[test]
    fn start_after_a_key_inside_a_group_still_shows_the_group() {
        let index: BTreeMap<Vec<u8>, ()> =
            ["a/1", "a/2", "b"].map(|k| (k.as_bytes().to_vec(), ())).into();
        let query = Query { delimiter: "/", after: After::Key("a/1".into()), max: 10, prefix: "" };
        let found = page(&index, &query);
        assert_eq!(found.groups, ["a/"]);
        assert_eq!(after_marker("a/", "", "/"), After::Group("a/".into()));
        assert_eq!(after_marker("a/1", "", "/"), After::Key("a/1".into()));
    }

    #[test]
    fn foreign_tokens_are_refused() {
        for bad in ["", "zz", "00", hex::encode("x").as_str(), hex::encode([b'k', 0xFF]).as_str()] {
            assert_eq!(After::from_token(bad), None, "{bad}");
        }
    }
}
