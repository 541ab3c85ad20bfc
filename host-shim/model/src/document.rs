//! YAML and JSON text as values that remember on which line each of their fields stands.
//!
//! One file holds any number of documents. A document that cannot be read ends its file there: what a broken file
//! holds is not guessed. Aliases are expanded, up to a bound, so that a small file cannot become a large value.

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::{Map, Number, Value};
use std::borrow::Cow;
use std::collections::HashMap;

/// Values in one file, aliases expanded. A cluster's worth of manifests is far below, a "billion laughs" far above.
const VALUES_PER_FILE: usize = 4_000_000;
/// Nesting; Kubernetes objects stay below 20.
const DEPTH: usize = 64;

/// One document of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    pub value: Value,
    /// The line on which it begins, from 1. 0: not from a file.
    pub line: u32,
    lines: HashMap<String, u32>,
}

/// Text that is not YAML, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Unreadable {
    pub line: u32,
    pub reason: String,
}

impl Document {
    /// A value that came from elsewhere than a file.
    pub fn without_lines(value: Value) -> Self {
        Self {
            value,
            line: 0,
            lines: HashMap::new(),
        }
    }

    /// The line of a field such as `spec.ingress[0].ports`, or of the nearest field above it.
    pub fn line_of(&self, field: &str) -> u32 {
        let mut path = field;
        loop {
            if let Some(line) = self.lines.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return self.line,
            }
        }
    }

    /// The documents in it: itself, or the items of a `List`.
    pub fn flatten(self) -> Vec<Self> {
        let is_list = self.value.get("kind").and_then(Value::as_str) == Some("List");
        let Some(Value::Array(items)) = self.value.get("items").filter(|_| is_list) else {
            return vec![self];
        };
        let items = items.iter().enumerate().map(|(index, item)| {
            let prefix = format!("items[{index}]");
            let lines = self.lines.iter().filter_map(|(path, line)| {
                let rest = path.strip_prefix(&prefix)?;
                Some((rest.strip_prefix('.').unwrap_or(rest).to_owned(), *line))
            });
            Self {
                value: item.clone(),
                line: self.line_of(&prefix),
                lines: lines.collect(),
            }
        });
        items.collect()
    }
}

/// Reads all documents of `text`. Documents before the first one that is not readable are returned beside the reason.
pub fn read(text: &str) -> (Vec<Document>, Option<Unreadable>) {
    let mut reader = Reader::default();
    let mut parser = Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    loop {
        match parser.next_event() {
            None | Some(Ok((Event::StreamEnd, _))) => return (reader.documents, None),
            Some(Ok((event, span))) => {
                let line = u32::try_from(span.start.line()).unwrap_or(u32::MAX);
                if let Err(reason) = reader.take(event, line) {
                    return (reader.documents, Some(Unreadable { line, reason }));
                }
            }
            Some(Err(error)) => {
                let line = u32::try_from(error.marker().line()).unwrap_or(u32::MAX);
                let reason = error.info().to_owned();
                return (reader.documents, Some(Unreadable { line, reason }));
            }
        }
    }
}

#[derive(Default)]
struct Reader {
    documents: Vec<Document>,
    lines: HashMap<String, u32>,
    line: u32,
    stack: Vec<Open>,
    root: Option<Value>,
    anchors: HashMap<usize, (Value, usize)>,
    values: usize,
}

/// A sequence or mapping that is not closed yet.
struct Open {
    anchor: usize,
    path: String,
    values_before: usize,
    node: Node,
}

enum Node {
    Sequence(Vec<Value>),
    Mapping(Map<String, Value>, Option<String>),
}

impl Reader {
    fn take(&mut self, event: Event<'_>, line: u32) -> Result<(), String> {
        match event {
            Event::DocumentStart(_) => {
                self.line = 0;
                self.root = None;
                self.anchors.clear();
            }
            Event::DocumentEnd => self.end_document(),
            Event::Scalar(text, style, anchor, tag) => {
                if self.is_key() {
                    return self.key(text.into_owned(), line);
                }
                let value = scalar(&text, style, tag.as_ref())?;
                self.place(line);
                self.value(value, anchor, 1)?;
            }
            Event::SequenceStart(anchor, _) => {
                self.open(anchor, line, Node::Sequence(Vec::new()))?;
            }
            Event::MappingStart(anchor, _) => {
                self.open(anchor, line, Node::Mapping(Map::new(), None))?;
            }
            Event::SequenceEnd | Event::MappingEnd => self.close()?,
            Event::Alias(anchor) => {
                if self.is_key() {
                    return Err("An alias cannot be a key here".into());
                }
                self.place(line);
                let (value, size) = self
                    .anchors
                    .get(&anchor)
                    .cloned()
                    .ok_or("Alias of an anchor that is not closed")?;
                self.value(value, 0, size)?;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd => {}
        }
        Ok(())
    }

    fn end_document(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        match self.root.take() {
            None | Some(Value::Null) => {}
            Some(value) => self.documents.push(Document {
                value,
                line: self.line,
                lines,
            }),
        }
    }

    fn is_key(&self) -> bool {
        matches!(
            self.stack.last(),
            Some(Open {
                node: Node::Mapping(_, None),
                ..
            })
        )
    }

    fn key(&mut self, key: String, line: u32) -> Result<(), String> {
        let Some(Open {
            path,
            node: Node::Mapping(map, pending),
            ..
        }) = self.stack.last_mut()
        else {
            return Err("A key outside a mapping".into());
        };
        if map.contains_key(&key) {
            return Err(format!("Key {key:?} stands twice in one mapping"));
        }
        self.lines.insert(field(path, &key), line);
        *pending = Some(key);
        Ok(())
    }

    /// The path of the value that comes next.
    fn path(&self) -> String {
        match self.stack.last() {
            None => String::new(),
            Some(Open {
                path,
                node: Node::Sequence(items),
                ..
            }) => format!("{path}[{}]", items.len()),
            Some(Open {
                path,
                node: Node::Mapping(_, key),
                ..
            }) => field(path, key.as_deref().unwrap_or_default()),
        }
    }

    /// Remembers where the next value stands.
    fn place(&mut self, line: u32) {
        if self.stack.is_empty() {
            self.line = line;
        } else {
            let path = self.path();
            self.lines.entry(path).or_insert(line);
        }
    }

    fn open(&mut self, anchor: usize, line: u32, node: Node) -> Result<(), String> {
        if self.is_key() {
            return Err("A key has to be a scalar".into());
        }
        if self.stack.len() >= DEPTH {
            return Err(format!("Nested deeper than {DEPTH} levels"));
        }
        self.place(line);
        self.stack.push(Open {
            anchor,
            path: self.path(),
            values_before: self.values,
            node,
        });
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        let Some(open) = self.stack.pop() else {
            return Err("Closed without an opening".into());
        };
        let size = 1 + self.values - open.values_before;
        let value = match open.node {
            Node::Sequence(items) => Value::Array(items),
            Node::Mapping(map, _) => Value::Object(map),
        };
        // What is inside is counted already.
        self.values = open.values_before;
        self.value(value, open.anchor, size)
    }

    fn value(&mut self, value: Value, anchor: usize, size: usize) -> Result<(), String> {
        self.values += size;
        if self.values > VALUES_PER_FILE {
            return Err(format!("More than {VALUES_PER_FILE} values in one file"));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, (value.clone(), size));
        }
        match self.stack.last_mut().map(|open| &mut open.node) {
            None => self.root = Some(value),
            Some(Node::Sequence(items)) => items.push(value),
            Some(Node::Mapping(map, key)) => {
                let key = key.take().ok_or("A value without a key")?;
                map.insert(key, value);
            }
        }
        Ok(())
    }
}

/// `path.key`; keys with dots or brackets (labels) are put into brackets.
fn field(path: &str, key: &str) -> String {
    match (path.is_empty(), key.contains(['.', '[', ']'])) {
        (_, true) => format!("{path}[{key}]"),
        (true, false) => key.to_owned(),
        (false, false) => format!("{path}.{key}"),
    }
}

/// A scalar by YAML's core schema; what is quoted, folded or literal is a string.
fn scalar(text: &str, style: ScalarStyle, tag: Option<&Cow<'_, Tag>>) -> Result<Value, String> {
    let string = || Value::String(text.to_owned());
    if let Some(tag) = tag {
        return match (tag.is_yaml_core_schema(), tag.suffix.as_str()) {
            (true, "str") => Ok(string()),
            (true, "int" | "float" | "bool" | "null") => Ok(plain(text)),
            _ => Err(format!("Tag {tag} is not used in manifests")),
        };
    }
    Ok(if style == ScalarStyle::Plain {
        plain(text)
    } else {
        string()
    })
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

fn number(text: &str) -> Option<Number> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok().map(Number::from);
    }
    if let Some(octal) = text.strip_prefix("0o") {
        return u64::from_str_radix(octal, 8).ok().map(Number::from);
    }
    if let Ok(integer) = text.parse::<i64>() {
        return Some(Number::from(integer));
    }
    if let Ok(integer) = text.parse::<u64>() {
        return Some(Number::from(integer));
    }
    let is_float = unsigned
        .chars()
        .all(|c| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-'))
        && unsigned.contains(|c: char| c.is_ascii_digit());
    if !is_float {
        return None;
    }
    text.parse::<f64>().ok().and_then(Number::from_f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn documents_of_one_file_know_their_lines() {
        let (documents, error) =
            read("# head\nkind: A\n---\n---\n\nkind: B\nspec:\n  list:\n  - a: 1\n    b: '2'\n");
        assert_eq!(error, None);
        let [a, b] = documents.as_slice() else {
            panic!("{documents:?}")
        };
        assert_eq!((a.line, &a.value), (2, &json!({"kind": "A"})));
        assert_eq!((b.line, b.line_of("spec.list[0].b")), (6, 10));
        assert_eq!(b.line_of("spec.list[0].c"), 9);
        assert_eq!(b.value["spec"], json!({"list": [{"a": 1, "b": "2"}]}));
    }

    #[test]
    fn a_break_in_the_second_document_leaves_the_first() {
        let (documents, error) = read("kind: A\n---\nkind: [B\nx: ]y\n");
        assert_eq!(documents.len(), 1);
        assert!(error.is_some_and(|error| error.line >= 3));
    }

    #[test]
    fn a_key_that_stands_twice_is_refused() {
        let (_, error) = read("kind: A\nkind: B\n");
        assert_eq!(error.map(|error| error.line), Some(2));
    }

    #[test]
    fn laughs_do_not_grow_to_a_billion() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for level in 1..9 {
            let former = format!("*a{}", level - 1);
            text += &format!(
                "a{level}: &a{level} [{}]\n",
                [former.as_str(); 10].join(",")
            );
        }
        assert!(read(&text).1.is_some());
    }

    #[test]
    fn items_of_a_list_are_documents() {
        let (documents, _) = read("kind: List\nitems:\n- kind: A\n- kind: B\n  x: {y: 1}\n");
        let flat: Vec<_> = documents.into_iter().flat_map(Document::flatten).collect();
        assert_eq!(flat.len(), 2);
        assert_eq!((flat[1].line, flat[1].line_of("x.y")), (4, 5));
    }

    #[test]
    fn json_is_read_as_it_is() {
        let (documents, error) =
            read("{\"kind\": \"A\",\n\t\"n\": [1, -2.5, true, null, \"\\u00e4\"]}");
        assert_eq!(error, None);
        assert_eq!(
            documents[0].value,
            json!({"kind": "A", "n": [1, -2.5, true, null, "ä"]})
        );
        assert_eq!(documents[0].line_of("n"), 2);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "[ \\-:\\[\\]{}a-c0-9&*!'\"\n|>%#,?]{0,80}") {
            let _ = read(&text);
        }

        #[test]
        fn values_written_as_json_are_read_back(keys in proptest::collection::btree_map("[a-z]{1,6}", any::<i64>(), 0..8)) {
            let value = json!(keys);
            let (documents, error) = read(&serde_json::to_string_pretty(&value).unwrap());
            prop_assert_eq!(error, None);
            prop_assert_eq!(&documents[0].value, &value);
        }
    }
}
