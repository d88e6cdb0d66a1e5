"""Of several texts of a clip, the one that is trained on."""

from salmonn_hf.data.text_choice import most_typical


def test_the_most_typical_caption_shares_most_with_the_others():
    captions = ["a dog barks", "a dog barks twice", "the dog barks", "a bell"]
    # mean F1 with the others: (6/7 + 2/3 + 2/5) / 3 of the first is the largest
    assert most_typical([caption.split() for caption in captions]) == 0
    assert most_typical([[1, 2], [3], [3, 4]]) == 1 and most_typical([[7, 7]]) == 0
