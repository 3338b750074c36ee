//! Reading SVG in tests: enough of XML to notice what a viewer would refuse.

/// Fails where tags do not nest, an attribute is not quoted or a character is not escaped.
pub(crate) fn check_xml(svg: &str) {
    let mut open = Vec::new();
    let mut rest = svg.trim();
    assert!(rest.starts_with("<svg "), "{rest:.60}");
    while let Some(start) = rest.find('<') {
        check_text(&rest[..start]);
        let end = start + rest[start..].find('>').expect("a tag that ends");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed in the wrong order");
            assert!(!open.is_empty() || rest.is_empty(), "text after the document");
            continue;
        }
        let (tag, empty) = match tag.strip_suffix('/') {
            Some(tag) => (tag, true),
            None => (tag, false),
        };
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        let quotes: Vec<&str> = attributes.split('"').collect();
        assert_eq!(quotes.len() % 2, 1, "an open quote: {tag}");
        for pair in quotes.chunks_exact(2) {
            assert!(pair[0].ends_with('='), "{tag}");
            check_text(pair[1]);
        }
        if !empty {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

/// The values of an attribute on all tags of a name, in order.
pub(crate) fn attributes<'a>(svg: &'a str, tag: &str, attribute: &str) -> Vec<&'a str> {
    svg.split('<')
        .filter(|piece| piece.strip_prefix(tag).is_some_and(|rest| rest.starts_with(' ')))
        .filter_map(|piece| piece.split(&format!(" {attribute}=\"")).nth(1)?.split('"').next())
        .collect()
}

fn check_text(text: &str) {
    assert!(!text.contains(|c: char| c == '>' || (c.is_control() && c != '\n')), "{text:?}");
    for after in text.split('&').skip(1) {
        let entity = after.split(';').next().unwrap_or_default();
        assert!(["lt", "gt", "amp", "quot", "apos"].contains(&entity), "{text:?}");
    }
}
