//! A new cluster on what is in the bucket.

use super::*;
use ebb_metaplane_protocol::command::IngestPage;
use std::collections::BTreeSet;

impl World {
    /// Every name of the bucket is found, and every object looked at, in an order that `turn` decides.
    pub fn from_bucket(bucket: &Bucket, turn: usize) -> Self {
        let mut w = Self::format(true);
        w.bucket = bucket.clone();
        // A mark that was copied along with its object says nothing.
        for (key, o) in &mut w.bucket.objects {
            o.link = o.link.take().filter(|(_, at)| at == key);
        }
        w.list(InodeId::ROOT, "");
        let mut found = w.tree();
        found.reverse();
        let half = found.len() / 2;
        found.rotate_left(turn % (half + 1));
        for (_, key) in found {
            let Some((id, etag)) = w.unseen(&key) else { continue };
            let attrs = attrs_of(&w.bucket.objects[&key]);
            w.done(Command::SetIngestAttrs(vec![(id, etag, attrs)]));
        }
        for (id, key) in w.tree() {
            if !key.ends_with('/') {
                w.expected.insert(id, w.bucket.objects[&key].body.clone());
            }
        }
        w
    }

    /// The inode that was found at a key and not looked at yet, with its object's etag.
    fn unseen(&self, key: &str) -> Option<(InodeId, String)> {
        let id = self.tree().into_iter().find(|(_, k)| k == key)?.0;
        let (at, etag) = self.read().attrs_source(id).expect("readable")?;
        // Nobody knows yet whether a directory has a mark.
        let etag = if etag.is_empty() { self.bucket.objects[key].etag.clone() } else { etag };
        (at == key).then_some((id, etag))
    }

    fn list(&mut self, dir: InodeId, prefix: &str) {
        let below = self.bucket.objects.iter().filter(|(k, _)| k.starts_with(prefix));
        let (mut names, mut entries) = (BTreeSet::new(), Vec::new());
        for (key, o) in below {
            let rest = &key[prefix.len()..];
            let Some(name) = rest.split('/').next().filter(|n| !n.is_empty()) else { continue };
            if !names.insert(name.to_owned()) {
                continue;
            }
            let is_dir = rest.contains('/');
            let (etag, size) = (o.etag.clone(), o.body.len() as u64);
            entries.push(IngestEntry {
                name: name.into(),
                object: (!is_dir).then(|| IngestObject { key: key.clone(), etag, size }),
                attrs: IngestAttrs {
                    kind: if is_dir { FileKind::Directory } else { FileKind::File },
                    mode: 0o644,
                    uid: 0,
                    gid: 0,
                    mtime: o.mtime,
                    more: More::None,
                    complete: false,
                },
            });
        }
        let listed_at = self.read().sequence().expect("readable");
        let page = Some(IngestPage { from: String::new(), next: None });
        self.done(Command::Ingest { dir, listed_at, entries, page });
        for name in names {
            let found = self.lookup(dir, &name).expect("there");
            if found.kind == FileKind::Directory {
                self.list(found.inode, &format!("{prefix}{name}/"));
            }
        }
    }

    /// Names by the file that they show, of regular files.
    pub fn names_by_file(&self) -> BTreeSet<Vec<String>> {
        let mut by_file: BTreeMap<InodeId, Vec<String>> = BTreeMap::new();
        for (id, key) in self.tree() {
            if self.attr(id).kind == FileKind::File {
                by_file.entry(id).or_default().push(key);
            }
        }
        by_file.into_values().collect()
    }
}
