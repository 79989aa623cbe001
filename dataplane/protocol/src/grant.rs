//! Grants and file views (PROTOCOL §2, §4, §9): what a node needs to serve a file, signed by the
//! metadata plane. A node takes no key, length or permission from a client's own words.

use crate::auth::{ClusterKey, MAC_BYTES};
use crate::codec::{self, Malformed};
use crate::ids::*;
use rkyv::{Archive, Deserialize, Serialize};

/// Cuts a view carries at most; a further truncate waits.
pub const CUTS_MAX: usize = 8;

/// Where the clean bytes of a file are in S3.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Backing {
    /// Key relative to the space's prefix.
    pub key: String,
    /// Entity tag the bytes must have (If-Match), quotes included as S3 sends them.
    pub etag: String,
    /// Bytes of the object.
    pub length: u64,
    /// Bytes of it that count: no read and no part copy passes min(length, limit).
    pub limit: u64,
}

impl Backing {
    /// Bytes of the object that are part of the file.
    pub fn valid_bytes(&self) -> u64 {
        self.length.min(self.limit)
    }
}

/// A truncate, as the nodes see it: bytes at or past `at` of generations up to `generation` are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct Cut {
    /// Highest generation that is cut.
    pub generation: Generation,
    /// First byte of the file that is cut.
    pub at: u64,
}

/// A half-open range of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
}

/// What a node needs to serve a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FileView {
    /// Grows with every change; requests name it.
    pub version: ViewVersion,
    /// Names the clean content; a clean chunk of another content id is stale.
    pub content: ContentId,
    /// Bumped by an outside change.
    pub lineage: Lineage,
    /// Generations up to this one are in the object.
    pub clean_generation: Generation,
    /// The object, if there is one.
    pub backing: Option<Backing>,
    /// Truncates that not every primary has journaled yet, oldest first.
    pub cuts: Vec<Cut>,
}

/// What a grant allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub enum GrantMode {
    /// Reads only.
    Read,
    /// Reads, and writes tagged with the grant's generation.
    Write,
}

/// Permission to read or write an inode at the chunk servers.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Grant {
    /// The cluster it is for.
    pub cluster: ClusterId,
    /// The inode.
    pub inode: InodeId,
    /// Read or write.
    pub mode: GrantMode,
    /// Writes carry this generation; reads may see dirty data of any.
    pub generation: Generation,
    /// Who holds it.
    pub session: SessionId,
    /// The file as of the grant.
    pub view: FileView,
    /// The cluster map's version when it was issued. A node refuses the grant for a placement group
    /// whose `since_map_version` is newer: what the donor had sealed stays sealed at the receiver.
    pub least_map_version: MapVersion,
    /// Writes must end at or below this byte (grows by doubling): it bounds every seal and cut.
    pub alloc_limit: u64,
}

/// A grant and the metadata plane's MAC over its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct SignedGrant {
    /// The encoded [`Grant`].
    pub bytes: Vec<u8>,
    /// HMAC-SHA256 of the bytes with the cluster key.
    pub mac: [u8; MAC_BYTES],
}

/// A grant that is not to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum BadGrant {
    /// Not signed with the cluster key.
    #[error("the grant's signature does not match")]
    Forged,
    /// Signed, but not readable (another version).
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl SignedGrant {
    /// Signs a grant.
    pub fn sign(grant: &Grant, key: &ClusterKey) -> Self {
        let bytes = codec::encode(grant);
        let mac = key.sign(&[b"ebb-grant", &bytes]);
        Self { bytes, mac }
    }
    /// Checks the MAC, then the structure.
    pub fn open(&self, key: &ClusterKey) -> Result<Grant, BadGrant> {
        if !key.verify(&[b"ebb-grant", &self.bytes], &self.mac) {
            return Err(BadGrant::Forged);
        }
        Ok(codec::decode(&self.bytes)?)
    }
    /// The grant as its holder sees it (clients hold the key too, but need not check their own
    /// metadata plane's signature).
    pub fn peek(&self) -> Result<Grant, Malformed> {
        codec::decode(&self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forged_or_altered_grant_never_opens() {
        let key = ClusterKey::new([1; 32]);
        let grant = Grant {
            cluster: ClusterId(5),
            inode: InodeId(9),
            mode: GrantMode::Write,
            generation: Generation(3),
            session: SessionId(4),
            view: FileView::default(),
            least_map_version: MapVersion(1),
            alloc_limit: RUN_BYTES,
        };
        let signed = SignedGrant::sign(&grant, &key);
        assert_eq!(signed.open(&key).expect("own signature"), grant);
        assert!(signed.open(&ClusterKey::new([2; 32])).is_err());
        for i in 0..signed.bytes.len() {
            let mut bad = signed.clone();
            bad.bytes[i] ^= 1;
            assert!(matches!(bad.open(&key), Err(BadGrant::Forged)));
        }
    }
}
