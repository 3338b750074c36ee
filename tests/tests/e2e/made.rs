//! Images that the program makes itself, and models with several levels of codes trained on them.

use std::fs;

use crate::support::{fail, names, succeed};

#[test]
fn made_images_are_a_folder_to_train_on() {
    let folder = tempfile::tempdir().unwrap();
    let make = ["data", "make-images", "made", "--size=20x18", "--count=12"];
    let said = succeed(folder.path(), make);
    assert!(said.out.contains("12 images of 20×18") && said.err.is_empty(), "{said:?}");
    let made = folder.path().join("made");
    assert_eq!(names(&made).len(), 10);
    assert_eq!(names(&made.join("circle")), ["00000000.png", "00000010.png"]);
    let image = image::open(made.join("circle/00000000.png")).unwrap();
    assert_eq!((image.width(), image.height()), (20, 18));

    let before = fs::read(made.join("star/00000004.png")).unwrap();
    fail(folder.path(), make, &["made", "not empty", "--overwrite"]);
    let more = ["data", "make-images", "made", "--size=20x18", "--seed=1", "--overwrite"];
    succeed(folder.path(), more.into_iter().chain(["--classes=star,ring", "--count=4"]));
    assert_ne!(fs::read(made.join("star/00000004.png")).unwrap(), before);
    assert_eq!(names(&made.join("star")), ["00000004.png", "00000014.png"]);
    assert!(names(&made.join("circle")).is_empty());

    let said = crate::support::run(folder.path(), more.into_iter().chain(["--classes=cube"]));
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.err.contains("capsule"), "{said:?}");
    fs::write(folder.path().join("file"), "x").unwrap();
    fail(folder.path(), ["data", "make-images", "file/made"], &["cannot write", "file/made"]);
}
