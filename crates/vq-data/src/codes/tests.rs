use proptest::prelude::*;

use super::*;

fn manifest(images: usize, images_per_shard: usize) -> CodesManifest {
    CodesManifest {
        format_version: CODES_FORMAT_VERSION,
        model: "abc".to_owned(),
        precision: "f32".to_owned(),
        normalization: Normalization { mean: vec![0.4914], std: vec![0.1] },
        dataset: "toy".to_owned(),
        split: "train".to_owned(),
        order: CODES_ORDER.to_owned(),
        images,
        images_per_shard,
        class_names: ["a", "b", "c"].map(str::to_owned).to_vec(),
        levels: vec![
            CodesLevel { grid: [2, 3], codebook_sizes: vec![512, 5] },
            CodesLevel { grid: [1, 1], codebook_sizes: vec![1] },
        ],
    }
}

/// Codes that differ from image to image.
fn codes(image: usize) -> ImageCodes {
    let code = |i: usize| ((image * 31 + i * 7) % if i.is_multiple_of(2) { 512 } else { 5 }) as u32;
    ImageCodes { label: (image % 3) as u32, levels: vec![(0..12).map(code).collect(), vec![0]] }
}

fn push(writer: &mut CodesWriter, images: std::ops::Range<usize>) {
    for image in images {
        assert_eq!(writer.next_image(), image);
        let ImageCodes { label, levels } = codes(image);
        let levels: Vec<&[u32]> = levels.iter().map(Vec::as_slice).collect();
        writer.push(label, &levels).unwrap();
    }
}

fn write(folder: &Path, images: usize, images_per_shard: usize) {
    let mut writer = CodesWriter::open(folder, manifest(images, images_per_shard)).unwrap();
    push(&mut writer, 0..images);
    writer.finish().unwrap();
}

#[test]
fn any_image_reads_back() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 10, 4);
    let open = CodesFolder::open(folder.path()).unwrap();
    assert_eq!(open.manifest(), &manifest(10, 4));
    for image in [9, 0, 4, 3, 7] {
        assert_eq!(open.read(image).unwrap(), codes(image));
    }
    assert!(open.read(10).unwrap_err().to_string().contains("index 10"));
    // 6 positions of 9 and 3 bits and one of none: 9 bytes and a label.
    let bytes: u64 =
        (0..3).map(|shard| fs::metadata(shard_path(folder.path(), shard)).unwrap().len()).sum();
    assert_eq!((bytes, manifest(10, 4).bytes()), (10 * 13 + 3 * 20, 10 * 13 + 3 * 20));
}

#[test]
fn threads_share_shards_of_which_few_are_open() {
    let folder = tempfile::tempdir().unwrap();
    let images = reader::MOST_OPEN + 10;
    write(folder.path(), images, 1);
    let open = CodesFolder::open(folder.path()).unwrap();
    assert_eq!((open.manifest().shards(), open.open_files()), (images, reader::MOST_OPEN));
    let few = tempfile::tempdir().unwrap();
    write(few.path(), images, 50);
    let few = CodesFolder::open(few.path()).unwrap();
    assert_eq!(few.open_files(), 2);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (open, few) = (&open, &few);
            scope.spawn(move || {
                for image in (0..images).map(|image| (image * 7 + thread * 13) % images) {
                    assert_eq!(open.read(image).unwrap(), codes(image));
                    assert_eq!(few.read(image).unwrap(), codes(image));
                }
            });
        }
    });
}

#[test]
fn an_interrupted_writer_goes_on_after_the_last_whole_shard() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CodesWriter::open(folder.path(), manifest(10, 4)).unwrap();
    push(&mut writer, 0..7);
    assert!(writer.finish().unwrap_err().to_string().contains("7 of 10"));
    let error = CodesFolder::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("shard-00001.bin") && error.contains("is missing"), "{error}");

    let mut writer = CodesWriter::open(folder.path(), manifest(10, 4)).unwrap();
    push(&mut writer, 4..10);
    writer.finish().unwrap();
    let straight = tempfile::tempdir().unwrap();
    write(straight.path(), 10, 4);
    for shard in 0..3 {
        let bytes = |folder: &Path| fs::read(shard_path(folder, shard)).unwrap();
        assert_eq!(bytes(folder.path()), bytes(straight.path()));
    }
    // Nothing is left to do.
    let writer = CodesWriter::open(folder.path(), manifest(10, 4)).unwrap();
    assert_eq!(writer.next_image(), 10);
    writer.finish().unwrap();
}

#[test]
fn damage_is_named_and_mended() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 10, 4);
    let path = shard_path(folder.path(), 1);
    let whole = fs::read(&path).unwrap();
    let refused = |part: &str| {
        let error = CodesFolder::open(folder.path()).unwrap_err().to_string();
        for part in ["shard-00001.bin", part, "vq encode"] {
            assert!(error.contains(part), "{error}");
        }
    };
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    refused("truncated");
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    refused("another file");
    for place in [0, 9, 20, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[place] ^= 4;
        fs::write(&path, &bytes).unwrap();
        refused(if place < 16 { "begin" } else { "checksum" });
    }
    let mut writer = CodesWriter::open(folder.path(), manifest(10, 4)).unwrap();
    push(&mut writer, 4..10);
    writer.finish().unwrap();
    CodesFolder::open(folder.path()).unwrap();
}

#[test]
fn other_codes_and_other_folders_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 5, 4);
    let other = CodesManifest { model: "xyz".to_owned(), ..manifest(5, 4) };
    let error = CodesWriter::open(folder.path(), other).unwrap_err().to_string();
    for part in ["model", "abc", "xyz", "--out"] {
        assert!(error.contains(part), "{error}");
    }
    let newer = CodesManifest { format_version: 9, ..manifest(5, 4) };
    newer.save(folder.path()).unwrap();
    let error = CodesFolder::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("version 9") && error.contains("update"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let error = CodesFolder::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("manifest.json") && error.contains("vq encode"), "{error}");
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    let error = CodesWriter::open(folder.path(), manifest(5, 4)).unwrap_err().to_string();
    assert!(error.contains("other files"), "{error}");
    fs::write(folder.path().join(MANIFEST_FILE), "{}").unwrap();
    assert!(CodesFolder::open(folder.path()).unwrap_err().to_string().contains("manifest"));
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CodesWriter::open(folder.path(), manifest(5, 4)).unwrap();
    let good = codes(0).levels;
    let mut refused = |label: u32, levels: &[&[u32]], part: &str| {
        let error = writer.push(label, levels).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(3, &[&good[0], &[0]], "label 3");
    refused(0, &[&good[0]], "2 levels");
    refused(0, &[&good[0][1..], &[0]], "12 codes");
    refused(0, &[&good[0], &[1]], "below 1");
    let mut bad = good[0].clone();
    bad[3] = 5;
    refused(0, &[&bad, &[0]], "below 5 in level 0, not 5");
    assert_eq!(writer.next_image(), 0);
    for wrong in [
        CodesManifest { images: 0, ..manifest(5, 4) },
        CodesManifest { levels: Vec::new(), ..manifest(5, 4) },
        CodesManifest {
            levels: vec![CodesLevel { grid: [2, 2], codebook_sizes: vec![0] }],
            ..manifest(5, 4)
        },
    ] {
        let folder = tempfile::tempdir().unwrap();
        assert!(CodesWriter::open(folder.path(), wrong).is_err());
    }
}

proptest! {
    #[test]
    fn every_size_packs_and_unpacks(
        sizes in proptest::collection::vec(1usize..=1 << 32, 1..4),
        grid in [1usize..4, 1usize..4],
        seed in any::<u64>(),
    ) {
        let levels = vec![CodesLevel { grid, codebook_sizes: sizes.clone() }];
        let layout = pack::Layout::new(&CodesManifest { levels, ..manifest(1, 1) });
        let mut state = seed;
        let codes: Vec<u32> = (0..grid[0] * grid[1] * sizes.len())
            .map(|index| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                ((state >> 31) % sizes[index % sizes.len()] as u64) as u32
            })
            .collect();
        let mut record = Vec::new();
        layout.pack(7, &[&codes], &mut record).unwrap();
        prop_assert_eq!(record.len(), layout.record_bytes());
        prop_assert_eq!(layout.unpack(&record), Some((7, vec![codes])));
        prop_assert_eq!(layout.unpack(&record[..record.len() - 1]), None);
    }
}
