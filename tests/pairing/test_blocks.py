import pytest

from hf_blockkd import BlockMap


@pytest.mark.parametrize(
    ("layers", "num_blocks", "ends"),
    [
        (12, 4, (3, 6, 9, 12)),
        (12, 1, (12,)),
        (12, 12, tuple(range(1, 13))),
        (7, 3, (2, 4, 7)),
        (5, 4, (1, 2, 3, 5)),
        (8, 3, (2, 5, 8)),
        (1, 1, (1,)),
    ],
)
def test_an_even_cut_gives_the_remainder_to_later_blocks(layers, num_blocks, ends):
    assert BlockMap.even(layers, layers, num_blocks) == BlockMap(ends, ends)


@pytest.mark.parametrize("student_layers", range(1, 9))
@pytest.mark.parametrize("teacher_layers", [1, 5, 12, 13])
def test_an_even_cut_covers_both_depths_with_blocks_that_differ_by_one_layer_at_most(student_layers, teacher_layers):
    for num_blocks in range(1, min(student_layers, teacher_layers) + 1):
        block_map = BlockMap.even(student_layers, teacher_layers, num_blocks)
        assert len(block_map) == num_blocks
        for ends, layers in ((block_map.student, student_layers), (block_map.teacher, teacher_layers)):
            sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
            assert sum(sizes) == layers
            assert min(sizes) >= 1
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "num_blocks", "message"),
    [
        (2, 12, 3, "`num_blocks` is 3, but the student has only 2 layers; set `num_blocks` to 2 or less"),
        (12, 1, 2, "`num_blocks` is 2, but the teacher has only 1 layer; set"),
        (4, 4, 0, "`num_blocks` must be at least 1, but got 0"),
        (4, 4, -1, "`num_blocks` must be at least 1, but got -1"),
    ],
)
def test_a_cut_that_the_depths_do_not_allow_is_refused(student_layers, teacher_layers, num_blocks, message):
    with pytest.raises(ValueError, match=message):
        BlockMap.even(student_layers, teacher_layers, num_blocks)


@pytest.mark.parametrize("boundaries", [[], [0, 4], [-1, 4], [2, 2, 4], [3, 2, 4]])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_boundaries_that_do_not_rise_are_refused_by_name(boundaries, who):
    fine = list(range(1, len(boundaries) + 1)) or [1]
    pair = (boundaries, fine) if who == "student" else (fine, boundaries)
    with pytest.raises(ValueError, match=f"`{who}_boundaries` must be a rising list"):
        BlockMap.from_boundaries(*pair)


def test_boundaries_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\] makes 2 blocks and `teacher_boundaries` \[2, 3, 4\] makes 3"):
        BlockMap.from_boundaries([1, 2], [2, 3, 4])


def test_boundaries_are_taken_as_given():
    block_map = BlockMap.from_boundaries([1, 3], [5, 6])
    assert (block_map.student, block_map.teacher) == ((1, 3), (5, 6))
    assert block_map == BlockMap((1, 3), (5, 6))
    assert hash(block_map) == hash(BlockMap((1, 3), (5, 6)))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (None, None, BlockMap((1, 3), (4, 8))),
        ([1, 2, 3], [2, 3, 8], BlockMap((1, 2, 3), (2, 3, 8))),
        ([1, 2, 3], None, BlockMap((1, 2, 3), (2, 5, 8))),
        (None, [1, 8], BlockMap((1, 3), (1, 8))),
        (None, [8], BlockMap((3,), (8,))),
    ],
)
def test_boundaries_win_over_the_number_of_blocks_and_the_other_side_is_cut_evenly(student, teacher, expected):
    assert BlockMap.cut(3, 8, 2, student, teacher) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([1, 2], [4, 8], r"`student_boundaries` \[1, 2\] ends at layer 2, but the student has 3 layers; make 3"),
        ([1, 3], [4, 9], r"`teacher_boundaries` \[4, 9\] ends at layer 9, but the teacher has 8 layers; make 8"),
        (None, [1, 2, 3, 8], "`num_blocks` is 4, but the student has only 3 layers"),
    ],
)
def test_boundaries_that_miss_the_depths_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        BlockMap.cut(3, 8, 2, student, teacher)


def test_it_prints_as_a_table():
    lines = str(BlockMap((1, 3), (11, 12))).splitlines()
    assert lines == [
        "block  student layers  teacher layers  stepping stone",
        "    1  0               0-10            student 1 layer -> teacher 1 layer",
        "    2  1-2             11              student 3 layers -> teacher head",
    ]


def test_a_map_is_read_as_it_was_saved(tmp_path):
    assert BlockMap.load(tmp_path) is None
    block_map = BlockMap.from_boundaries([1, 3], [4, 12])
    block_map.save(tmp_path)
    assert BlockMap.load(tmp_path) == block_map


@pytest.mark.parametrize("text", ["{", "[]", '{"student": [1, 2]}', '{"student": [2, 1], "teacher": [1, 2]}'])
def test_a_file_that_holds_no_map_is_refused(tmp_path, text):
    (tmp_path / "blocks.json").write_text(text)
    with pytest.raises(ValueError, match=r"blocks.json holds no cut into blocks \(.*\); delete it"):
        BlockMap.load(tmp_path)
