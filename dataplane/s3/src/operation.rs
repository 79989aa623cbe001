//! The S3 operations this crate speaks, named once for errors, for fault switches and for logs.
//!
//! Does not know how they are sent or served. `is_mutation` is what I3 hangs on: the lost reply of
//! a mutation is never taken for success or for failure.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One kind of S3 request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    Get,
    Head,
    List,
    Put,
    CreateMultipart,
    UploadPart,
    UploadPartCopy,
    CompleteMultipart,
    AbortMultipart,
    ListParts,
    ListMultipartUploads,
    Copy,
    Delete,
    DeleteMany,
    HeadBucket,
    CreateBucket,
    ListBuckets,
}

impl Operation {
    /// Whether the operation changes what the server holds.
    pub fn is_mutation(self) -> bool {
        use Operation::*;
        match self {
            Get | Head | List | ListParts | ListMultipartUploads | HeadBucket | ListBuckets => {
                false
            }
            Put | CreateMultipart | UploadPart | UploadPartCopy | CompleteMultipart
            | AbortMultipart | Copy | Delete | DeleteMany | CreateBucket => true,
        }
    }

    /// The name used in configuration, errors and logs.
    pub fn name(self) -> &'static str {
        use Operation::*;
        match self {
            Get => "get",
            Head => "head",
            List => "list",
            Put => "put",
            CreateMultipart => "create_multipart",
            UploadPart => "upload_part",
            UploadPartCopy => "upload_part_copy",
            CompleteMultipart => "complete_multipart",
            AbortMultipart => "abort_multipart",
            ListParts => "list_parts",
            ListMultipartUploads => "list_multipart_uploads",
            Copy => "copy",
            Delete => "delete",
            DeleteMany => "delete_many",
            HeadBucket => "head_bucket",
            CreateBucket => "create_bucket",
            ListBuckets => "list_buckets",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
