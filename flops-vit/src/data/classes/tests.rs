//! Classes that are found, and those that would be guessed.

use super::*;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| name.to_string()).collect()
}

fn numbered(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{prefix}{i}")).collect()
}

fn find(model: &[&str], data: &[&str]) -> Result<ClassOutputs, ClassError> {
    ClassOutputs::find(&names(model), &names(data))
}

#[test]
fn names_decide_in_any_order() {
    let found = find(&["dog", "cat"], &["cat", "dog"]).unwrap();
    assert_eq!((found.outputs.clone(), found.by, found.remarks.len()), (vec![1, 0], MatchedBy::Name, 0));
    assert_eq!([0, 1, 2].map(|output| found.class(output)), [Some(1), Some(0), None]);
    // equal names are not compared one by one
    assert_eq!(find(&["crane", "crane"], &["crane", "crane"]).unwrap().outputs, [0, 1]);
}

#[test]
fn case_and_the_signs_between_words_do_not_count() {
    let found = find(&["aquarium_fish", "Dog", "maple tree"], &["DOG", "aquarium fish", "maple-tree"]).unwrap();
    assert_eq!((found.outputs, found.by), (vec![1, 0, 2], MatchedBy::Name));
    assert!(found.remarks[0].contains("DOG is Dog, aquarium fish is aquarium_fish"), "{:?}", found.remarks);
    // an exact name comes first
    assert_eq!(find(&["cat", "Cat"], &["Cat", "cat"]).unwrap().outputs, [1, 0]);
}

// the names of google/vit-base-patch16-224: id2label has synonyms, and `crane` and `maillot` twice
#[test]
fn synonyms_decide_where_they_name_one_output() {
    let model = ["tabby, tabby cat", "tiger cat", "crane", "crane", "maillot", "maillot, tank suit"];
    let found = find(&model, &["tabby_cat", "tiger cat"]).unwrap();
    assert_eq!(found.outputs, [0, 1]);
    assert!(found.remarks[0].contains("tabby_cat is tabby, tabby cat"), "{:?}", found.remarks);
    let error = find(&model, &["crane", "tiger cat"]).unwrap_err();
    assert!(matches!(&error, ClassError::Ambiguous { class, first: 2, second: 3, .. } if class == "crane"), "{error}");
    // the full name is that of one output, the synonym of two
    assert_eq!(find(&model, &["maillot", "tank suit"]).unwrap().outputs, [4, 5]);
    assert!(matches!(find(&["a, b", "b, c"], &["b"]), Err(ClassError::Ambiguous { first: 0, second: 1, .. })));
}

#[test]
fn a_part_of_the_models_classes_is_remarked() {
    let found = find(&["cow", "dog", "cat"], &["cat", "dog"]).unwrap();
    assert_eq!(found.outputs, [2, 1]);
    assert_eq!(found.names, ["cow", "dog", "cat"]);
    assert_eq!(found.remarks, ["the data has 2 of the model's 3 classes; all 3 may be predicted"]);
}

#[test]
fn numbers_decide_by_value_and_not_by_the_alphabet() {
    let mut data = numbered("", 12);
    data.sort();
    assert_eq!(data[..4], ["0", "1", "10", "11"]);
    for model in [numbered("LABEL_", 12), numbered("class ", 12), numbered("", 12), numbered("kind ", 12)] {
        let found = ClassOutputs::find(&model, &data).unwrap();
        assert_eq!(found.outputs, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9], "{model:?}");
    }
    let found = ClassOutputs::find(&numbered("LABEL_", 12), &data).unwrap();
    assert_eq!(found.by, MatchedBy::Number);
    assert!(found.remarks[0].contains("10 is LABEL_10"), "{:?}", found.remarks);
}

#[test]
fn numbers_are_read_in_every_spelling() {
    for class in ["3", "003", "LABEL_3", "label-3", "class_3", "Class 03", "class3"] {
        let found = find(&["a", "b", "c", "d"], &[class]).unwrap();
        assert_eq!((found.outputs, found.by), (vec![3], MatchedBy::Number), "{class}");
    }
    // outputs that are called by other numbers than their index
    assert_eq!(find(&["7", "3", "5"], &["05", "03"]).unwrap().outputs, [2, 1]);
    for class in ["", "-", "label", "3a", "3.5", "three", "99999999999999999999999"] {
        assert_eq!(number(class), None, "{class}");
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    // folders that count from 1
    let error = find(&["LABEL_0", "LABEL_1"], &["1", "2"]).unwrap_err();
    assert!(matches!(&error, ClassError::NoSuchNumber { class, outputs: 2, .. } if class == "2"), "{error}");
    assert!(error.to_string().contains("LABEL_0 to LABEL_1"), "{error}");
    let error = find(&["a", "b", "c"], &["2", "02"]).unwrap_err();
    assert!(matches!(&error, ClassError::Twice { output: 2, .. }), "{error}");
}

#[test]
fn position_decides_only_where_outputs_have_no_names() {
    let found = find(&["LABEL_0", "LABEL_1"], &["cat", "dog"]).unwrap();
    assert_eq!((found.outputs, found.by), (vec![0, 1], MatchedBy::Position));
    assert!(found.remarks[0].contains("cat is LABEL_0, dog is LABEL_1"), "{:?}", found.remarks);
    assert_eq!(found.names, ["cat", "dog"]);
    for (model, data) in [
        // other names, other numbers of classes, a number among the names, numbers as names
        (&["ape", "cow"][..], &["cat", "dog"][..]),
        (&["LABEL_0", "LABEL_1", "LABEL_2"], &["cat", "dog"]),
        (&["LABEL_0", "LABEL_1"], &["cat", "1"]),
        (&["0", "1"], &["cat", "dog"]),
        (&["LABEL_1", "LABEL_0"], &["cat", "dog"]),
        (&["3", "03"], &["003", "4"]),
        (&["cat", "cow"], &["cat", "dog"]),
    ] {
        let error = find(model, data).unwrap_err();
        assert!(matches!(&error, ClassError::Unknown { .. }), "{model:?} {data:?}: {error}");
        assert!(error.to_string().contains(model[0]) && error.to_string().lines().count() == 1, "{error}");
    }
}

#[test]
fn classes_that_share_an_output_are_refused() {
    let error = find(&["cat", "dog"], &["cat", "Cat"]).unwrap_err();
    assert!(matches!(&error, ClassError::Twice { output: 0, .. }), "{error}");
    assert!(error.to_string().contains("cat and Cat"), "{error}");
}

// ILSVRC2012: the outputs of its models are in the order of the WordNet ids
#[test]
fn the_folders_of_imagenet_are_its_models_outputs() {
    let mut data: Vec<String> = (0..1000).map(|i| format!("n{i:08}")).collect();
    let mut model: Vec<String> = (0..1000).map(|i| format!("thing {i}, stuff")).collect();
    for (index, id, name) in IMAGENET {
        (data[index], model[index]) = (id.to_string(), format!("{}, other", name.to_uppercase()));
    }
    let found = ClassOutputs::find(&model, &data).unwrap();
    assert_eq!((found.by, found.outputs[574]), (MatchedBy::WordNetId, 574));
    data.swap(0, 217);
    assert!(matches!(ClassOutputs::find(&model, &data), Err(ClassError::Unknown { of: 1000, .. })));
}
