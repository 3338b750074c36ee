//! Many relative paths in little memory.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Paths below a folder, their parts joined with `/`, one after the other in one buffer: a million of
/// them take about what their letters take.
#[derive(Debug, Default)]
pub(super) struct Names {
    bytes: Vec<u8>,
    ends: Vec<u64>,
}

impl Names {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn push(&mut self, name: &[u8]) {
        self.bytes.extend_from_slice(name);
        self.ends.push(self.bytes.len() as u64);
    }

    /// The path of that number; empty beyond the last.
    pub(super) fn get(&self, index: usize) -> &[u8] {
        let start = match index {
            0 => 0,
            _ => self.ends.get(index - 1).copied().unwrap_or(u64::MAX),
        };
        let end = self.ends.get(index).copied().unwrap_or(start);
        self.bytes.get(start as usize..end as usize).unwrap_or_default()
    }

    /// The path of that number, below `root`.
    pub(super) fn path(&self, root: &Path, index: usize) -> PathBuf {
        root.join(to_path(self.get(index)))
    }

    /// The number of a path, where the paths are in [`order`].
    pub(super) fn find(&self, name: &[u8]) -> Option<usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            match order(self.get(middle), name) {
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
                Ordering::Equal => return Some(middle),
            }
        }
        None
    }

    pub(super) fn shrink(&mut self) {
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
    }
}

/// The order of the images: part by part, each by its bytes, as a walk through sorted folders gives it.
pub(super) fn order(a: &[u8], b: &[u8]) -> Ordering {
    // No part of a path holds a 0.
    let key = |&byte: &u8| if byte == b'/' { 0 } else { byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// The bytes of a part of a path, from which [`to_path`] makes it again. Where the system's names are no
/// bytes and one is no text either, it comes back as one that is not there.
pub(super) fn to_bytes(name: &OsStr) -> Cow<'_, [u8]> {
    #[cfg(unix)]
    return Cow::Borrowed(std::os::unix::ffi::OsStrExt::as_bytes(name));
    #[cfg(not(unix))]
    return Cow::Owned(name.to_string_lossy().into_owned().into_bytes());
}

pub(super) fn to_path(bytes: &[u8]) -> PathBuf {
    #[cfg(unix)]
    return PathBuf::from(<OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(bytes));
    #[cfg(not(unix))]
    return PathBuf::from(String::from_utf8_lossy(bytes).into_owned());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_order_is_that_of_the_parts(
            mut paths in proptest::collection::vec("[.!a0]{1,2}(/[.!a0]{1,2}){0,2}", 0..20)
        ) {
            let mut by_parts: Vec<Vec<String>> =
                paths.iter().map(|path| path.split('/').map(str::to_owned).collect()).collect();
            by_parts.sort();
            paths.sort_by(|a, b| order(a.as_bytes(), b.as_bytes()));
            let expected: Vec<String> = by_parts.iter().map(|parts| parts.join("/")).collect();
            prop_assert_eq!(&paths, &expected);

            paths.dedup();
            let mut names = Names::default();
            for path in &paths {
                names.push(path.as_bytes());
            }
            for (index, path) in paths.iter().enumerate() {
                prop_assert_eq!(names.get(index), path.as_bytes());
                prop_assert_eq!(names.find(path.as_bytes()), Some(index));
            }
            prop_assert_eq!(names.find(b"b"), None);
            prop_assert_eq!(names.get(paths.len()), b"");
        }
    }
}
