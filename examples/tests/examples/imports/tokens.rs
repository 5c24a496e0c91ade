//! The tokens of a source file, without what is left out of a plain build.

/// Splits a list at the commas outside of brackets.
pub fn split(list: &[String]) -> impl Iterator<Item = &[String]> {
    let mut depth = 0;
    let parts = list.split(move |token| {
        match token.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        depth == 0 && token == ","
    });
    parts.filter(|part| !part.is_empty())
}

/// The index of the bracket that closes the one at `open`.
pub fn closing(tokens: &[String], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    panic!("a bracket is not closed: {}", tokens[open..].iter().take(20).cloned().collect::<Vec<_>>().join(" "))
}

/// Whether a token is a name or a keyword.
pub fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c == '_' || c.is_alphabetic())
}

/// Leaves out the bodies of macros, and all that is compiled for tests or documentation alone.
pub fn without_left_out(tokens: &[String]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        let after = |k: usize| tokens.get(i + k).map_or("", String::as_str);
        if tokens[i] == "#" && after(1) == "!" && after(2) == "[" {
            let end = closing(tokens, i + 2);
            if is_left_out(&tokens[i + 3..end]) {
                return kept;
            }
            i = end + 1;
        } else if tokens[i] == "#" && after(1) == "[" {
            let (start, mut left_out) = (i, false);
            while i + 1 < tokens.len() && tokens[i] == "#" && tokens[i + 1] == "[" {
                let end = closing(tokens, i + 1);
                left_out |= is_left_out(&tokens[i + 2..end]);
                i = end + 1;
            }
            if left_out {
                i = end_of_item(tokens, i);
            } else {
                kept.extend_from_slice(&tokens[start..i]);
            }
        } else if tokens[i] == "macro_rules" && after(1) == "!" {
            kept.extend_from_slice(&tokens[i..i + 3]);
            i = closing(tokens, i + 3) + 1;
        } else {
            kept.push(tokens[i].clone());
            i += 1;
        }
    }
    kept
}

/// Whether an attribute is a `cfg` that holds neither without tests nor without documentation.
fn is_left_out(attribute: &[String]) -> bool {
    attribute.len() > 3 && attribute[0] == "cfg" && holds(&attribute[2..attribute.len() - 1]) == Some(false)
}

/// Whether a `cfg` holds where neither tests nor documentation are built; `None` where other
/// settings decide.
fn holds(predicate: &[String]) -> Option<bool> {
    let parts = || split(&predicate[2..predicate.len() - 1]).map(holds);
    match predicate[0].as_str() {
        "test" | "doc" | "doctest" => Some(false),
        "not" => parts().next()?.map(|holds| !holds),
        "all" if parts().any(|part| part == Some(false)) => Some(false),
        "any" if parts().all(|part| part == Some(false)) => Some(false),
        _ => None,
    }
}

/// The index behind the item, statement, field or arm that starts at `start`.
fn end_of_item(tokens: &[String], start: usize) -> usize {
    let mut first = start;
    while tokens.get(first).is_some_and(|token| token == "pub") {
        first += 1;
        if tokens.get(first).is_some_and(|token| token == "(") {
            first = closing(tokens, first) + 1;
        }
    }
    let word = |k: usize| tokens.get(first + k).map_or("", String::as_str);
    let statement = match word(0) {
        "use" | "let" | "static" | "type" => true,
        "const" => !["fn", "unsafe", "async", "extern"].contains(&word(1)),
        _ => false,
    };
    let items = ["mod", "fn", "struct", "enum", "union", "trait", "impl", "const", "unsafe", "async", "extern"];
    let item = items.contains(&word(0)) || word(0) == "macro_rules";
    let (mut i, mut angles) = (first, 0);
    while i < tokens.len() {
        match tokens[i].as_str() {
            ";" => return i + 1,
            "," if !statement && !item && angles <= 0 => return i + 1,
            ")" | "]" | "}" => return i,
            "<" => angles += 1,
            ">" if !["-", "="].contains(&tokens[i - 1].as_str()) => angles -= 1,
            "(" | "[" => i = closing(tokens, i),
            "{" => {
                i = closing(tokens, i);
                if !statement {
                    return i + 1 + usize::from(tokens.get(i + 1).is_some_and(|token| token == "," && !item));
                }
            }
            _ => {}
        }
        i += 1;
    }
    i
}

/// Words, `::` and single signs; a literal is `"`, a lifetime `'`. Comments are left out.
pub fn tokens(source: &str) -> Vec<String> {
    let chars: Vec<char> = source.chars().collect();
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let end = word_end(&chars, i);
        if chars[i].is_whitespace() {
            i += 1;
        } else if let Some(end) = comment_end(&chars, i) {
            i = end;
        } else if let Some(end) = literal_end(&chars, i) {
            i = end;
            tokens.push("\"".into());
        } else if chars[i] == '\'' {
            i = word_end(&chars, i + 1);
            tokens.push("'".into());
        } else if end > i {
            let word: String = chars[i..end].iter().collect();
            // behind `r#` the word itself follows
            if word == "r" && chars.get(end) == Some(&'#') {
                i = end + 1;
            } else {
                i = end;
                tokens.push(word);
            }
        } else if starts(&chars, i, "::") {
            i += 2;
            tokens.push("::".into());
        } else {
            tokens.push(chars[i].into());
            i += 1;
        }
    }
    tokens
}

fn starts(chars: &[char], i: usize, text: &str) -> bool {
    text.chars().enumerate().all(|(k, c)| chars.get(i + k) == Some(&c))
}

fn word_end(chars: &[char], start: usize) -> usize {
    start + chars[start.min(chars.len())..].iter().take_while(|c| **c == '_' || c.is_alphanumeric()).count()
}

/// The index behind the comment that starts at `start`, if one does.
fn comment_end(chars: &[char], start: usize) -> Option<usize> {
    if starts(chars, start, "//") {
        return Some(start + chars[start..].iter().take_while(|c| **c != '\n').count());
    }
    if !starts(chars, start, "/*") {
        return None;
    }
    let (mut i, mut depth) = (start + 2, 1);
    while i < chars.len() && depth > 0 {
        (depth, i) = match (starts(chars, i, "/*"), starts(chars, i, "*/")) {
            (true, _) => (depth + 1, i + 2),
            (_, true) => (depth - 1, i + 2),
            _ => (depth, i + 1),
        };
    }
    Some(i)
}

/// The index behind the string, character or number that starts at `start`, if one does.
fn literal_end(chars: &[char], start: usize) -> Option<usize> {
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    if at(start).is_numeric() {
        return Some(word_end(chars, start));
    }
    let open = word_end(chars, start);
    let prefix: String = chars[start..open].iter().collect();
    let hashes = (open..).take_while(|&k| at(k) == '#').count();
    if ["r", "br", "cr"].contains(&&prefix[..]) && at(open + hashes) == '"' {
        let close = format!("\"{}", "#".repeat(hashes));
        let end = (open + hashes + 1..chars.len()).find(|&i| starts(chars, i, &close));
        return Some(end.unwrap_or(chars.len()) + close.len());
    }
    let quote = at(open);
    let character = quote == '\'' && (at(open + 1) == '\\' || at(open + 2) == '\'');
    if !["", "b", "c"].contains(&&prefix[..]) || !(quote == '"' || character) {
        return None;
    }
    let mut i = open + 1;
    while i < chars.len() && at(i) != quote {
        i += if at(i) == '\\' { 2 } else { 1 };
    }
    Some(i + 1)
}
