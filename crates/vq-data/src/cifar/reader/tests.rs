use std::fs;

use super::*;

/// A whole data set of pseudo-random bytes; returns its folder and the bytes of each file.
fn write_set() -> (tempfile::TempDir, Vec<Vec<u8>>) {
    let dir = tempfile::tempdir().expect("a folder");
    let mut state = 1_u32;
    let files = FILES
        .iter()
        .map(|file| {
            let mut bytes = vec![0; RECORDS * RECORD_BYTES];
            for byte in &mut bytes {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            for record in bytes.chunks_exact_mut(RECORD_BYTES) {
                record[0] %= 10;
            }
            fs::write(dir.path().join(file), &bytes).expect("writable");
            bytes
        })
        .collect();
    (dir, files)
}

/// One test, since the set takes 184 MB.
#[test]
fn reads_what_is_there_and_refuses_what_is_damaged() {
    let (dir, files) = write_set();

    let splits = super::super::open(dir.path(), [32, 32]).expect("a whole set");
    assert_eq!((splits.train.len(), splits.test.len()), (50_000, 10_000));
    assert_eq!(splits.train.class_names()[9], "truck");
    let mut image = vec![0; SHAPE.pixels()];
    for (file, bytes) in files.iter().enumerate() {
        for (record, expected) in bytes.chunks_exact(RECORD_BYTES).enumerate().step_by(7) {
            let (split, index) = if file < 5 {
                (&splits.train, file * RECORDS + record)
            } else {
                (&splits.test, record)
            };
            split.read(index, &mut image).expect("in range");
            assert_eq!(image, expected[1..], "file {file}, record {record}");
            assert_eq!(split.label(index), u32::from(expected[0]));
        }
    }
    drop(splits);

    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    fs::write(dir.path().join("batches.meta.txt"), names.join("\n") + "\n\n").expect("writable");
    assert_eq!(class_names(dir.path()), names);
    fs::write(dir.path().join("batches.meta.txt"), "a\nb").expect("writable");
    assert_eq!(class_names(dir.path()), CLASSES);

    let refused = || read(dir.path(), "get it").expect_err("damaged").to_string();

    let path = dir.path().join(FILES[3]);
    let mut bytes = files[3].clone();
    bytes[1234 * RECORD_BYTES] = 10;
    fs::write(&path, &bytes).expect("writable");
    let message = refused();
    assert!(message.contains("data_batch_4.bin: record 1234 has label 10"), "{message}");
    assert!(message.contains("`get it --force`"), "{message}");

    fs::write(&path, &bytes[..1_000_000]).expect("writable");
    let message = refused();
    for part in ["data_batch_4.bin has 1000000 bytes", "30730000", "`get it`"] {
        assert!(message.contains(part), "{message}");
    }

    fs::remove_file(&path).expect("was there");
    let message = refused();
    assert!(message.contains("data_batch_4.bin is missing; run `get it`"), "{message}");
}

#[test]
fn another_size_is_refused() {
    let error = super::super::open(Path::new("data"), [64, 32]).expect_err("32×32 only");
    assert!(error.to_string().contains("64×32"));
}
