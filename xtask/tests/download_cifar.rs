//! `download-cifar` against a real HTTP server on the loopback.

// Clippy's exception for tests leaves out the functions that tests share.
#![allow(clippy::expect_used)]

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use support::{FILE_BYTES, Reply, Server, add, archive, archive_of, digest};
use tar::EntryType;
use xtask::download_cifar::{Error, FILES, FOLDER, Options, Outcome, run};

fn options(dir: &Path, url: &str, archive: &[u8]) -> Options {
    Options {
        dir: dir.join("data"),
        url: url.to_owned(),
        sha256: digest(archive),
        file_bytes: FILE_BYTES,
        retry_pause: Duration::from_millis(1),
        ..Options::default()
    }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

/// What lies in the data folder, sorted; partial downloads by their names.
fn listing(options: &Options) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(&options.dir)
        .map(|dir| dir.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort();
    names
}

/// The data is there, whole, and nothing else is.
fn assert_installed(options: &Options) {
    assert_eq!(listing(options), [FOLDER]);
    for (i, file) in FILES.iter().enumerate() {
        let bytes = fs::read(options.dir.join(FOLDER).join(file)).expect("is there");
        assert_eq!(bytes, support::noise(FILE_BYTES as usize, i as u32), "{file}");
    }
}

fn refused(options: &Options) -> Error {
    let error = run(options).expect_err("must fail");
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

#[test]
fn downloads_once() {
    let (dir, archive) = (folder(), archive());
    let body = archive.clone();
    let server = Server::start(move |_, request| Reply::ranged(&body, "\"1\"", request));
    let mut options = options(dir.path(), &server.url, &archive);
    let target = options.dir.join(FOLDER);
    assert_eq!(run(&options).expect("fetched"), Outcome::Installed(target.clone()));
    assert_installed(&options);
    assert_eq!(server.requests()[0].range, None);
    assert_eq!(server.requests()[0].accept_encoding.as_deref(), Some("identity"));

    let again = run(&options).expect("is there");
    assert_eq!(again, Outcome::AlreadyThere(target.clone()));
    assert!(again.to_string().contains("nothing to do"));
    assert_eq!(server.requests().len(), 1);

    // A file that is not whole, or --force, replaces the folder.
    fs::write(target.join(FILES[2]), b"short").expect("writable");
    run(&options).expect("fetched");
    assert_installed(&options);
    options.force = true;
    run(&options).expect("fetched");
    assert_installed(&options);
    assert_eq!(server.requests().len(), 3);
}

#[test]
fn goes_on_after_dropped_connections() {
    let (dir, archive) = (folder(), archive());
    let body = archive.clone();
    let server = Server::start(move |number, request| {
        let reply = Reply::ranged(&body, "\"1\"", request);
        if number < 3 { reply.cut(10_000) } else { reply }
    });
    let options = options(dir.path(), &server.url, &archive);
    run(&options).expect("fetched");
    assert_installed(&options);
    let starts: Vec<_> = server.requests().iter().map(support::Request::start).collect();
    assert_eq!(starts, [None, Some(10_000), Some(20_000), Some(30_000)]);
    assert_eq!(server.requests()[1].if_range.as_deref(), Some("\"1\""));
}

#[test]
fn a_second_run_goes_on_where_the_first_gave_up() {
    let (dir, archive) = (folder(), archive());
    let body = archive.clone();
    let server = Server::start(move |number, request| match number {
        0 => Reply::ranged(&body, "\"1\"", request).cut(12_345),
        1..5 => Reply::status(503),
        _ => Reply::ranged(&body, "\"1\"", request),
    });
    let options = options(dir.path(), &server.url, &archive);
    let error = refused(&options);
    assert!(matches!(error, Error::GaveUp { attempts: 5, .. }), "{error}");
    assert_eq!(
        listing(&options),
        [".cifar-10-binary.tar.gz.origin", ".cifar-10-binary.tar.gz.part"]
    );
    run(&options).expect("fetched");
    assert_installed(&options);
    assert_eq!(server.requests()[5].start(), Some(12_345));
    assert_eq!(server.requests().len(), 6);
}

#[test]
fn a_server_without_ranges_starts_again() {
    let (dir, archive) = (folder(), archive());
    let body = archive.clone();
    let server = Server::start(move |number, _| {
        let reply = Reply::whole(&body);
        if number == 0 { reply.cut(20_000) } else { reply }
    });
    let options = options(dir.path(), &server.url, &archive);
    run(&options).expect("fetched");
    assert_installed(&options);
    assert_eq!(server.requests()[1].start(), Some(20_000));
}

#[test]
fn an_archive_that_changed_meanwhile_is_fetched_whole() {
    let (dir, archive) = (folder(), archive());
    let (old, body) = (support::noise(60_000, 9), archive.clone());
    let server = Server::start(move |number, request| match number {
        0 => Reply::ranged(&old, "\"old\"", request).cut(40_000),
        _ => Reply::ranged(&body, "\"new\"", request),
    });
    let options = options(dir.path(), &server.url, &archive);
    run(&options).expect("fetched");
    assert_installed(&options);
    assert_eq!(server.requests()[1].if_range.as_deref(), Some("\"old\""));
    assert_eq!(server.requests().len(), 2);
}

/// Without a tag nothing tells the versions apart but the digest.
#[test]
fn pieces_of_two_versions_are_noticed_and_fetched_again() {
    let (dir, archive) = (folder(), archive());
    let (old, body) = (support::noise(60_000, 9), archive.clone());
    let server = Server::start(move |number, request| {
        let body = if number == 0 { &old } else { &body };
        let mut reply = Reply::ranged(body, "", request);
        reply.headers.retain(|(name, _)| *name != "ETag");
        if number == 0 { reply.cut(30_000) } else { reply }
    });
    let options = options(dir.path(), &server.url, &archive);
    run(&options).expect("fetched");
    assert_installed(&options);
    let starts: Vec<_> = server.requests().iter().map(support::Request::start).collect();
    assert_eq!(starts, [None, Some(30_000), None]);
}

#[test]
fn a_part_that_is_whole_or_too_long_is_handled() {
    let (dir, archive) = (folder(), archive());
    let body = archive.clone();
    let server = Server::start(move |_, request| Reply::ranged(&body, "\"1\"", request));
    let options = options(dir.path(), &server.url, &archive);
    let leave = |bytes: &[u8], url: &str| {
        fs::create_dir_all(&options.dir).expect("writable");
        let part = options.dir.join(".cifar-10-binary.tar.gz.part");
        fs::write(part, bytes).expect("writable");
        let origin = options.dir.join(".cifar-10-binary.tar.gz.origin");
        fs::write(origin, format!("{url}\n\"1\"\n")).expect("writable");
    };
    // Killed between the download and the unpacking: no request at all.
    leave(&archive, &server.url);
    fs::create_dir_all(options.dir.join(".cifar-10-unpacking-x/y")).expect("writable");
    run(&options).expect("unpacked");
    assert_installed(&options);
    assert_eq!(server.requests().len(), 0);

    // As long as the archive, and longer, with other bytes: 416, then all of it.
    for len in [archive.len(), archive.len() + 1] {
        let seen = server.requests().len();
        fs::remove_dir_all(options.dir.join(FOLDER)).expect("was there");
        leave(&vec![1; len], &server.url);
        run(&options).expect("fetched");
        assert_installed(&options);
        let requests = server.requests();
        assert_eq!(requests[seen].start(), Some(len));
        assert_eq!(requests[seen + 1].start(), None);
        assert_eq!(requests.len(), seen + 2);
    }

    // From elsewhere: not used.
    fs::remove_dir_all(options.dir.join(FOLDER)).expect("was there");
    leave(&archive[..1000], "http://elsewhere/");
    run(&options).expect("fetched");
    assert_installed(&options);
    assert_eq!(server.requests().last().and_then(support::Request::start), None);
}

#[test]
fn a_wrong_digest_is_refused_and_nothing_stays() {
    let (dir, archive) = (folder(), archive());
    let body = archive[..archive.len() - 100].to_vec();
    let server = Server::start(move |_, request| Reply::ranged(&body, "\"1\"", request));
    let options = options(dir.path(), &server.url, &archive);
    let error = refused(&options);
    assert!(matches!(error, Error::WrongDigest { .. }), "{error}");
    assert!(error.to_string().contains(&options.sha256), "{error}");
    assert_eq!(listing(&options), [""; 0]);
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_truncated_archive_of_the_right_digest_leaves_nothing() {
    let (dir, archive) = (folder(), archive());
    let half = archive[..archive.len() / 2].to_vec();
    let body = half.clone();
    let server = Server::start(move |_, request| Reply::ranged(&body, "\"1\"", request));
    let options = options(dir.path(), &server.url, &half);
    let error = refused(&options);
    assert!(matches!(error, Error::Archive { .. }), "{error}");
    assert_eq!(listing(&options), [""; 0]);
}

#[test]
fn statuses_that_cannot_get_better_end_at_once() {
    let dir = folder();
    let server = Server::start(|_, _| Reply::status(404));
    let error = refused(&options(dir.path(), &server.url, b""));
    assert!(error.to_string().contains("404") && error.to_string().contains("--url"), "{error}");
    assert_eq!(server.requests().len(), 1);

    // Nobody listens here.
    let error = refused(&options(dir.path(), "http://127.0.0.1:1/x", b""));
    assert!(matches!(error, Error::GaveUp { .. }), "{error}");
    assert_eq!(listing(&options(dir.path(), "", b"")), [""; 0]);
}

#[test]
fn archives_that_would_write_elsewhere_are_refused() {
    let outside = folder();
    let absolute = outside.path().join("evil");
    let absolute = absolute.to_str().expect("plain");
    let entries = [
        ("../evil", EntryType::Regular, ""),
        ("cifar-10-batches-bin/../../evil", EntryType::Regular, ""),
        (absolute, EntryType::Regular, ""),
        ("cifar-10-batches-bin/link", EntryType::Symlink, "/etc"),
        ("cifar-10-batches-bin/link", EntryType::Link, "../../evil"),
        ("cifar-10-batches-bin/pipe", EntryType::Fifo, ""),
    ];
    for (name, kind, link) in entries {
        let dir = folder();
        let archive = archive_of(FILE_BYTES, |tar| {
            let data: &[u8] = if kind == EntryType::Regular { b"evil" } else { b"" };
            add(tar, name, kind, data, link);
        });
        let body = archive.clone();
        let server = Server::start(move |_, request| Reply::ranged(&body, "\"1\"", request));
        let options = options(dir.path(), &server.url, &archive);
        let error = refused(&options);
        assert!(matches!(error, Error::Unsafe { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(listing(&options), [""; 0]);
        assert_eq!(fs::read_dir(dir.path()).expect("is there").count(), 1);
        assert_eq!(fs::read_dir(outside.path()).expect("is there").count(), 0);
    }
}

#[test]
fn an_archive_of_something_else_does_not_replace_the_data() {
    let (dir, good) = (folder(), archive());
    let other = archive_of(FILE_BYTES - 1, |_| {});
    let path = dir.path().join("my archive.tar.gz");
    let url = format!("file://{}", path.display()).replace(' ', "%20");
    fs::write(&path, &good).expect("writable");
    let mut options = options(dir.path(), &url, &good);
    run(&options).expect("unpacked");
    assert_installed(&options);

    fs::write(&path, &other).expect("writable");
    options.force = true;
    assert!(matches!(refused(&options), Error::WrongDigest { .. }));
    options.sha256 = digest(&other).to_uppercase();
    let error = refused(&options);
    assert!(matches!(error, Error::Incomplete { file: "data_batch_1.bin", .. }), "{error}");
    assert_installed(&options);
}

#[test]
fn two_runs_at_once_do_not_mix() {
    let (dir, archive) = (folder(), archive());
    let options = options(dir.path(), "http://127.0.0.1:1/x", &archive);
    fs::create_dir_all(&options.dir).expect("writable");
    let part =
        fs::File::create(options.dir.join(".cifar-10-binary.tar.gz.part")).expect("writable");
    part.lock().expect("free");
    let error = refused(&options);
    assert!(matches!(error, Error::Busy(_)), "{error}");
}

fn command(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask")).args(arguments).output().expect("runs")
}

/// The program itself, with files of the real size.
#[test]
fn the_command_says_what_it_did() {
    let dir = folder();
    let data = dir.path().join("data");
    let data = data.to_str().expect("plain");
    let archive = archive_of(xtask::download_cifar::FILE_BYTES, |_| {});
    let path = dir.path().join("cifar.tar.gz");
    fs::write(&path, &archive).expect("writable");
    let url = format!("file://{}", path.display());
    let sha256 = digest(&archive);

    let output = command(&["download-cifar", "--dir", data, "--url", &url]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    assert!(text.contains("c4a38c50a1bc"), "{text}");

    let arguments = ["download-cifar", "--dir", data, "--url", &url, "--sha256", &sha256];
    for expected in ["CIFAR-10 is in", "nothing to do"] {
        let output = command(&arguments);
        assert!(output.status.success(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(expected), "{output:?}");
    }

    let other = dir.path().join("other");
    let other = other.to_str().expect("plain");
    for (arguments, words) in [
        (["--dir", other, "--sha256", "12"], "64 hexadecimal digits"),
        (["--dir", other, "--url", "ftp://a/b"], "--url takes"),
        (["--dir", other, "--url", "file:///nowhere.tar.gz"], "cannot read /nowhere.tar.gz"),
        (["--dir", "/dev/null/x", "--url", &url], "cannot create /dev/null/x"),
    ] {
        let output = command(&[&["download-cifar"][..], &arguments[..]].concat());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(words) && text.lines().count() == 1, "{text}");
    }
}
