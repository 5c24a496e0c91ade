use super::*;
use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::tokenizer::tests::JSON;
use serde_json::json;

/// What the tokenizer makes of a text after `change`, or the error.
fn encoded(change: impl FnOnce(&mut Value), text: &str) -> Result<Vec<i64>, String> {
    let mut json: Value = serde_json::from_str(JSON).unwrap();
    change(&mut json);
    let tokenizer = TextTokenizer::from_bytes(json.to_string().as_bytes());
    let tokens = tokenizer.and_then(|tokenizer| tokenizer.encode(&[text], 8));
    tokens.map(|tokens| tokens.ids()[0].clone()).map_err(|e| e.to_string())
}

/// Checks that the error names the value and is one line.
fn assert_refused(expected: &str, change: impl FnOnce(&mut Value)) {
    let found = encoded(change, "a dög").unwrap_err();
    assert!(found.contains(expected) && found.lines().count() == 1, "{found}, expected {expected}");
}

/// The library's `apply_template` unwraps a look-up of the token, and indexes the texts.
#[test]
fn a_template_with_a_missing_token_is_refused() {
    assert_refused("the token [SEP], which special_tokens lacks", |json| {
        json["post_processor"]["special_tokens"].as_object_mut().unwrap().remove("[SEP]");
    });
    assert_refused("template 'pair' has the token [X]", |json| {
        json["post_processor"]["pair"][0] = json!({"SpecialToken": {"id": "[X]", "type_id": 0}});
    });
    let second = json!({"Sequence": {"id": "B", "type_id": 0}});
    assert_refused("a place for a second text", |json| json["post_processor"]["single"][1] = second);
    // the same inside a sequence of processors
    assert_refused("the token [SEP]", |json| {
        json["post_processor"]["special_tokens"].as_object_mut().unwrap().remove("[SEP]");
        json["post_processor"] = json!({"type": "Sequence", "processors": [json["post_processor"]]});
    });
}

#[test]
fn special_tokens_are_in_the_vocabulary_and_of_type_0() {
    assert_refused("special token [CLS] has the id 99, which is not in its vocabulary", |json| {
        json["post_processor"]["special_tokens"]["[CLS]"]["ids"] = json!([99]);
    });
    assert_refused("[CLS] has 2 ids and 1 tokens", |json| {
        json["post_processor"]["special_tokens"]["[CLS]"]["ids"] = json!([2, 2]);
    });
    assert_refused("type_id = 1; only the token type 0", |json| {
        json["post_processor"]["single"][1]["Sequence"]["type_id"] = json!(1);
    });
    let bert = |sep: u32| json!({"type": "BertProcessing", "sep": ["[SEP]", sep], "cls": ["[CLS]", 2]});
    assert_refused("special token [SEP] has the id 102", |json| json["post_processor"] = bert(102));
    assert_eq!(encoded(|json| json["post_processor"] = bert(3), "a dog").unwrap(), [2, 4, 6, 3]);
}

/// `chunks(0)` panics, as does `&b[prefix_len..]` beyond the end of `b`.
#[test]
fn sizes_that_the_library_would_panic_at_are_refused() {
    assert_refused("length = 0", |json| json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0}));
    let one = encoded(|json| json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 1}), "a").unwrap();
    assert_eq!(one, [2, 4, 3]);
    let bpe = |second: &str, merges: Value| {
        json!({"type": "BPE", "continuing_subword_prefix": "##", "unk_token": null, "merges": merges,
            "vocab": {"a": 4, second: 5, "ab": 6, "[PAD]": 0, "[CLS]": 2, "[SEP]": 3}})
    };
    for merges in [json!(["a b"]), json!([["a", "b"]])] {
        assert_refused("without the subword prefix '##'", |json| json["model"] = bpe("b", merges));
    }
    let whole = encoded(|json| json["model"] = bpe("##b", json!(["a ##b"])), "ab").unwrap();
    assert_eq!(whole, [2, 6, 3]);
    assert_refused("dropout = 0.5, so that a text's tokens are random", |json| {
        json["model"] = bpe("##b", json!(["a ##b"]));
        json["model"]["dropout"] = json!(0.5);
    });
}

/// Where the library meets a value that is not JSON inside `decoder`, it panics.
#[test]
fn damaged_json_is_an_error() {
    for whole in [JSON.replace("\"decoder\": null", "\"decoder\": {\"type\": \"Fuse\", \"x\": 1e999}"), "{".into()] {
        let found = TextTokenizer::from_bytes(whole.as_bytes()).unwrap_err();
        assert!(matches!(&found, MultimodalError::Tokenizer(why) if why.contains("fetch it again")), "{found}");
    }
    let half = JSON.replace("\"decoder\": null", "\"decoder\": {\"type\":");
    assert!(TextTokenizer::from_bytes(half.as_bytes()).is_err());
}

/// An added token of which the normaliser leaves nothing is found between any two bytes: the library
/// then cuts characters in two, and panics.
#[test]
fn an_added_token_without_characters_is_refused() {
    let strip = |normalized: bool| {
        move |json: &mut Value| {
            json["normalizer"] = json!({"type": "Strip", "strip_left": true, "strip_right": true});
            let token = json!({"id": 8, "content": "  ", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": normalized, "special": false});
            json["added_tokens"].as_array_mut().unwrap().push(token);
        }
    };
    assert_refused("its normalizer leaves nothing of the added token \"  \"", strip(true));
    assert_eq!(encoded(strip(false), "a dog").unwrap(), [2, 4, 6, 3]);
}

/// A double array of SentencePiece's that maps "a" to the text at `value`.
fn charsmap_of_a(value: u32, texts: &[u8]) -> Value {
    let mut units = vec![0u32; 512];
    // the children of the root are those at 256 ^ byte
    units[0] = 256 << 10;
    let a = 256 ^ u32::from(b'a');
    // one child, which is a value
    units[a as usize] = u32::from(b'a') | 1 << 8 | (a ^ 300) << 10;
    units[300] = value | 1 << 31;
    let bytes: Vec<u8> = units.into_iter().flat_map(u32::to_le_bytes).collect();
    let size = (bytes.len() as u32).to_le_bytes();
    json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode([&size[..], bytes.as_slice(), texts].concat())})
}

#[test]
fn damaged_character_maps_are_refused() {
    let runs = |json: &mut Value| json["normalizer"] = charsmap_of_a(2, b"x\0runs\0");
    assert_eq!(encoded(runs, "a").unwrap(), [2, 7, 3]);
    for (map, expected) in [
        (charsmap_of_a(99, b"x\0runs\0"), "is damaged"),
        (charsmap_of_a(1, "ä\0".as_bytes()), "is damaged"),
        (charsmap_of_a(0, &[0xff]), "is damaged"),
        (json!({"type": "Precompiled", "precompiled_charsmap": "!"}), "is no base64"),
        (json!({"type": "Precompiled", "precompiled_charsmap": ""}), "is empty"),
        (json!({"type": "Precompiled", "precompiled_charsmap": null}), "is no base64"),
        (json!({"type": "Precompiled"}), "is no base64"),
        (json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode([255u8; 8])}), "is cut off"),
        (json!({"type": "Precompiled", "precompiled_charsmap": STANDARD.encode([0u8; 4])}), "is damaged"),
    ] {
        assert_refused(expected, |json| json["normalizer"] = map.clone());
        let inside = json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, map]});
        assert_refused(expected, |json| json["normalizer"] = inside);
    }
    // a root whose children lie outside
    let outside = json!({"type": "Precompiled", "precompiled_charsmap":
        STANDARD.encode([4u32.to_le_bytes(), (1u32 << 20).to_le_bytes()].concat())});
    assert_refused("is damaged", |json| json["normalizer"] = outside);
}
