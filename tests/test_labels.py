"""What classes are called: ImageNet's three kinds of names are one vocabulary, all others are themselves."""
import itertools
import random

import pytest

from cb_vit.datasets.labels import Unmatched, assumes_imagenet, imagenet_ids, match, wnids

WNIDS = wnids()
NUMBERS = tuple(map(str, range(1000)))


def words(first):
    """The names in words as public lists have them: all synonyms, or the first."""
    import importlib.resources

    lines = importlib.resources.files("cb_vit.datasets").joinpath("imagenet.txt").read_text().splitlines()
    names = [line.split(" ", 1)[1] for line in lines]
    return tuple(name.split(", ")[0] if first else name for name in names)


ALL, FIRST = words(False), words(True)
UNDERSCORES = tuple(name.replace(" ", "_") for name in FIRST)


def test_the_table_is_imagenets():
    assert len(WNIDS) == 1000 == len(set(WNIDS)) and list(WNIDS) == sorted(WNIDS)  # the order of ILSVRC-2012
    known = {0: ("n01440764", "tench"), 207: ("n02099601", "golden retriever"), 281: ("n02123045", "tabby"),
             388: ("n02510455", "giant panda"), 999: ("n15075141", "toilet tissue")}
    assert {i: (WNIDS[i], FIRST[i]) for i in known} == known
    assert len(set(ALL)) == 999 and len(set(FIRST)) == 998  # crane; and maillot, which has a synonym once


@pytest.mark.parametrize("ours, theirs", [*itertools.product([WNIDS, ALL, FIRST, UNDERSCORES, NUMBERS], repeat=2)])
def test_whole_lists_are_one_vocabulary(ours, theirs):
    assert match(ours, theirs, 1000) == tuple(range(1000))


@pytest.mark.parametrize("theirs", [WNIDS, ALL, FIRST, NUMBERS])
def test_a_part_in_another_order_keeps_its_numbers(theirs):
    rng = random.Random(0)
    chosen = rng.sample([i for i in range(1000) if FIRST.count(FIRST[i]) == 1], 50)
    shuffled = rng.sample(range(1000), 1000)
    for names in (WNIDS, ALL, FIRST) + (NUMBERS,) * (theirs is not NUMBERS):
        assert match([names[i] for i in chosen], theirs, 1000) == tuple(chosen)
    if theirs is not NUMBERS:  # whose numbers would not be their places
        places = match([WNIDS[i] for i in chosen], [theirs[i] for i in shuffled], 1000)
        assert places == tuple(shuffled.index(i) for i in chosen)


@pytest.mark.parametrize("name, meant", [("crane", (134, 517)), ("maillot", (638, 639)), ("sand viper", (54, 66))])
@pytest.mark.parametrize("theirs", [WNIDS, ALL, FIRST, None])
def test_words_that_stand_for_two_classes_are_refused(name, meant, theirs):
    first, second = (WNIDS[i] for i in meant)
    with pytest.raises(Unmatched, match=f"'{name}' stands for {first} and {second} of ImageNet; call it by"):
        match(["tench", name], theirs, 1000)
    assert match(["tench", first, second], theirs, 1000) == (0, *meant)


def test_what_a_list_says_itself_comes_before_further_synonyms():
    assert imagenet_ids("partridge", False) == {86}  # also a synonym of ruffed grouse
    assert (imagenet_ids("Cardigan", False), imagenet_ids("cardigan", False)) == ({264}, {474})  # corgi and jacket
    assert imagenet_ids("CARDIGAN", False) == {264, 474}
    assert imagenet_ids("Great_White_Shark", False) == imagenet_ids("man-eater", False) == {2}
    assert imagenet_ids("emu", False) == imagenet_ids("7", False) == imagenet_ids("1000", True) == frozenset()


@pytest.mark.parametrize("ours, theirs, places", [
    (("dog", "emu"), ("cat", "dog", "emu"), (1, 2)),
    (("crane", "goldfish"), ("goldfish", "crane"), (1, 0)),  # somebody's own two classes
    (("n01443537",), ("goldfish", "crane"), (0,)),
    (("7", "03"), tuple("0123456789"), (7, 3)),  # numbers are their values
    (("Cat",), ("cat", "Cat"), (1,)),
    (("a", "b"), ("a", "b"), (0, 1))])
def test_names_are_matched(ours, theirs, places):
    assert match(ours, theirs, len(theirs)) == places


@pytest.mark.parametrize("ours, theirs, message", [
    (("cat", "fox", "owl"), ("cat", "dog"), "class 'fox' is not among cat, dog"),
    (("Cat",), ("cat", "dog"), "class 'Cat' is not among cat, dog"),
    (("tench",), tuple("0123456789"), "class 'tench' is not among 0, 1, 2, 3, 4 and 5 more"),
    (("0", "1"), ("tench", "goldfish"), "class '0' is not among tench, goldfish"),
    (("0", "1"), WNIDS[:200], "class '0' is not among n01440764"),  # part of ImageNet: a place there, or the class?
    (("n02012849",), ("goldfish", "crane"), "class 'n02012849' stands for n02012849 and n03126707"),
    (("tench", "n01440764"), WNIDS, "classes 'tench' and 'n01440764' are both 'n01440764' there"),
    (("7", "007"), tuple("0123456789"), "classes '7' and '007' are both '7' there"),
    (("b",), ("b", "b"), "class 'b' stands 2 times among b, b"),
    (("b", "b"), ("b", "c"), "classes 'b' and 'b' are both 'b' there")])
def test_what_differs_first_is_named(ours, theirs, message):
    with pytest.raises(Unmatched, match=f"^{message}"):
        match(ours, theirs, len(theirs))


def test_classes_without_examples_need_no_place():
    assert match(("cat", "fox"), ("dog", "cat"), 2, occurs=[True, False]) == (1, -1)
    with pytest.raises(Unmatched, match="'fox'"):
        match(("cat", "fox"), ("dog", "cat"), 2, occurs=[True, True])


def test_without_names_only_a_thousand_of_imagenets_can_be_told():
    assert match(None, ("a", "b"), 2) is None and match(("a", "b"), None, 2) is None and match(None, None, 2) is None
    assert match(("a",) * 1000, None, 1000) is None and match(("tench", "cat"), None, 1000) is None
    assert match(("n01443537", "tench"), None, 1000) == (1, 0) == match(("1", "0"), None, 1000)
    assert assumes_imagenet(("tench",), None, 1000) and not assumes_imagenet(("tench",), WNIDS, 1000)
    assert not assumes_imagenet(("tench",), None, 21843) and not assumes_imagenet(None, None, 1000)
