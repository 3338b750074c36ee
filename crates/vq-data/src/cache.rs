//! Where the operating system wants programs to keep what they can make again.

use std::ffi::OsString;
use std::path::PathBuf;

/// The folder for what can be made again, such as the indexes of folders of images: `VQ_CACHE_DIR` if
/// that is set (empty: none), else `vq` in the user's cache folder: `XDG_CACHE_HOME` or `~/.cache`,
/// `~/Library/Caches` on a Mac, `%LOCALAPPDATA%` on Windows. It need not be there yet.
pub fn cache_dir() -> Option<PathBuf> {
    choose(|name| std::env::var_os(name).filter(|value| !value.is_empty() || name == OWN))
}

const OWN: &str = "VQ_CACHE_DIR";

fn choose(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(own) = variable(OWN) {
        return (!own.is_empty()).then(|| own.into());
    }
    let below = |name: &str, rest: &str| variable(name).map(|home| PathBuf::from(home).join(rest));
    if cfg!(windows) {
        return below("LOCALAPPDATA", "vq");
    }
    // The specification says that a relative one is to be ignored.
    let xdg = below("XDG_CACHE_HOME", "vq").filter(|path| path.is_absolute());
    let usual = if cfg!(target_os = "macos") { "Library/Caches/vq" } else { ".cache/vq" };
    xdg.or_else(|| below("HOME", usual))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_set_is_taken() {
        let with = |set: &[(&str, &str)]| {
            choose(|name| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
            })
        };
        let (home, xdg) = (("HOME", "/home/me"), ("XDG_CACHE_HOME", "/fast"));
        assert_eq!(with(&[]), None);
        assert!(with(&[home]).expect("a folder").starts_with("/home/me"));
        assert_eq!(with(&[home, xdg]), Some("/fast/vq".into()));
        assert_eq!(with(&[home, ("XDG_CACHE_HOME", "here")]), with(&[home]));
        assert_eq!(with(&[home, xdg, (OWN, "/mine")]), Some("/mine".into()));
        assert_eq!(with(&[home, xdg, (OWN, "")]), None);
    }
}
