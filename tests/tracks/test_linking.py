"""What is linked to what: steps, gaps, divisions, and what is none."""

import numpy as np
import pytest

from nuclei3d.config.sections import TracksParams
from nuclei3d.tracks.linking import link_nuclei
from nuclei3d.tracks.nuclei import Nuclei, Tracks

DIAMETER = 10.0
FULL = float(np.pi / 6 * DIAMETER**3)
Seen = tuple[float, float, float, float, float]
"""z, y, x in um; volume as a share of a full nucleus; intensity."""


def table(*frames: list[Seen]) -> Nuclei:
    rows = np.array([row for frame in frames for row in frame], float).reshape(-1, 5)
    counts = [len(frame) for frame in frames]
    return Nuclei(
        frame=np.repeat(np.arange(len(frames)), counts),
        label=np.concatenate([np.arange(1, count + 1) for count in counts]),
        position_um=rows[:, :3],
        volume_um3=FULL * rows[:, 3],
        intensity=rows[:, 4],
        score=np.full(len(rows), np.nan),
    )


def still(*rows: Seen, frames: int) -> list[list[Seen]]:
    return [list(rows) for _ in range(frames)]


#: Others around, that stay where they are, so that a frame has a typical intensity.
CROWD: list[Seen] = [(z, y, 60.0, 1.0, 100.0 + z / 4) for z in (0, 14, 28) for y in (0, 14, 28)]


def linked(*frames: list[Seen], **params: object) -> tuple[Nuclei, Tracks]:
    nuclei = table(*[[*frame, *CROWD] for frame in frames])
    return nuclei, link_nuclei(nuclei, TracksParams.model_validate(params))


def origin(tracks: Tracks, frame: int, label: int) -> tuple[int, int] | None:
    nuclei = tracks.nuclei
    row = int(np.flatnonzero((nuclei.frame == frame) & (nuclei.label == label))[0])
    before = int(tracks.predecessor[row])
    return None if before < 0 else (int(nuclei.frame[before]), int(nuclei.label[before]))


def test_nothing_gives_nothing() -> None:
    assert len(link_nuclei(table([]), TracksParams()).predecessor) == 0


def test_neighbours_that_change_places_in_the_list_keep_their_tracks() -> None:
    one, other = (0.0, 0.0, 0.0, 1.0, 100.0), (0.0, 0.0, 11.0, 1.0, 100.0)
    _, tracks = linked([one, other], [other, one])
    assert origin(tracks, 1, 1) == (0, 2)
    assert origin(tracks, 1, 2) == (0, 1)


def test_a_nucleus_that_is_missing_for_two_frames_goes_on() -> None:
    here, there = (0.0, 0.0, 0.0, 1.0, 100.0), (0.0, 2.0, 0.0, 1.0, 100.0)
    assert origin(linked([here], [], [], [there])[1], 3, 1) == (0, 1)
    assert origin(linked([here], [], [], [there], max_gap=1)[1], 3, 1) is None


def test_what_is_seen_in_one_frame_only_is_marked() -> None:
    here: Seen = (0.0, 0.0, 0.0, 1.0, 100.0)
    flash: Seen = (0.0, 20.0, -20.0, 0.3, 100.0)
    nuclei, tracks = linked([here, flash], [here], [here, flash], [here], [here, flash], max_gap=0)
    marked = np.flatnonzero(tracks.seen_once)
    # of the first and the last frame it is not known
    assert [(nuclei.frame[row], nuclei.label[row]) for row in marked] == [(2, 2)]


def test_what_jumps_further_than_a_step_is_another() -> None:
    _, tracks = linked([(0.0, 0.0, 0.0, 1.0, 100.0)], [(0.0, 9.5, 0.0, 1.0, 100.0)])
    assert origin(tracks, 1, 1) is None


def division(
    sizes: tuple[float, float] = (0.4, 0.4), light: float = 180.0, off: float = 0.0
) -> list[list[Seen]]:
    mother: Seen = (0.0, 0.0, 0.0, 1.0, 100.0)
    plate: Seen = (0.0, 0.0, 0.0, 0.4, light)
    pair: list[Seen] = [(0.0, -4.0 + off, 0.0, sizes[0], light), (0.0, 4.0 + off, 0.0, sizes[1], light)]
    return [*still(mother, frames=4), [plate], pair, pair, pair]


def test_a_mother_has_two_daughters() -> None:
    nuclei, tracks = linked(*division())
    assert origin(tracks, 5, 1) == origin(tracks, 5, 2) == (4, 1)
    (mother,) = tracks.divisions
    assert (nuclei.frame[mother], nuclei.label[mother]) == (4, 1)
    numbered = tracks.numbered()
    daughters = numbered.track[(nuclei.frame == 5) & (nuclei.label <= 2)]
    assert len(set(daughters)) == 2
    assert set(numbered.parent[daughters]) == {numbered.track[0]}


def test_a_division_is_seen_without_intensities() -> None:
    nuclei = table(*[[*frame, *CROWD] for frame in division()])
    blind = Nuclei(**{**vars(nuclei), "intensity": np.full(len(nuclei), np.nan)})
    assert len(link_nuclei(blind, TracksParams()).divisions) == 1


def test_a_nucleus_that_was_missed_beside_another_is_no_daughter() -> None:
    one, other = (0.0, 0.0, 0.0, 1.0, 100.0), (0.0, 9.0, 0.0, 1.0, 100.0)
    _, tracks = linked(*still(one, frames=4), *still(one, other, frames=4))
    assert len(tracks.divisions) == 0


def test_a_nucleus_in_two_pieces_for_one_frame_has_not_divided() -> None:
    whole: Seen = (0.0, 0.0, 0.0, 1.0, 100.0)
    pieces: list[Seen] = [(0.0, -2.0, 0.0, 0.5, 100.0), (0.0, 2.5, 0.0, 0.5, 100.0)]
    nuclei, tracks = linked([whole], [whole], pieces, [whole], [whole])
    assert len(tracks.divisions) == 0
    # and its track goes on to the end
    numbered = tracks.numbered()
    assert numbered.track[nuclei.frame == 4][0] == numbered.track[0]


def test_drift_and_rotation_of_the_whole_do_not_break_tracks() -> None:
    rng = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*[np.arange(4) * 12.0] * 3), -1).reshape(-1, 3)
    grid += rng.normal(0, 1, grid.shape)
    turn = np.array([[1, 0, 0], [0, np.cos(0.1), -np.sin(0.1)], [0, np.sin(0.1), np.cos(0.1)]])
    frames, moved = [], grid
    for _ in range(8):
        frames.append([(*place, 1.0, 100.0) for place in moved + rng.normal(0, 0.5, grid.shape)])
        moved = moved @ turn.T + [4.0, 7.0, 0.0]
    nuclei = table(*frames)

    def wrong(tracks: Tracks) -> int:
        before = tracks.predecessor[nuclei.frame > 0]
        same = (before >= 0) & (nuclei.label[before] == nuclei.label[nuclei.frame > 0])
        return int((~same).sum())

    assert wrong(link_nuclei(nuclei, TracksParams())) == 0
    assert wrong(link_nuclei(nuclei, TracksParams(remove_motion=False))) > 100


def random_tree(rng: np.random.Generator) -> Tracks:
    frame = np.repeat(np.arange(6), 5)
    before = np.full(30, -1)
    for row in range(5, 30):
        if rng.random() < 0.8:
            earlier = np.flatnonzero(frame < frame[row])
            free = [r for r in earlier if (before == r).sum() < 2 and frame[r] >= frame[row] - 2]
            before[row] = rng.choice(free) if free else -1
    return Tracks(Nuclei.unmeasured(frame, np.tile(np.arange(1, 6), 6)), before)


@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_tracks_are_paths_of_the_graph(seed: int) -> None:
    tracks = random_tree(np.random.default_rng(seed))
    frame, before = tracks.nuclei.frame, tracks.predecessor
    for split in (False, True):
        numbered = tracks.numbered(split_gaps=split)
        assert set(numbered.track) == set(range(1, len(numbered.parent)))
        for number in range(1, len(numbered.parent)):
            rows = np.flatnonzero(numbered.track == number)
            # one after the other, each from the one before
            np.testing.assert_array_equal(before[rows[1:]], rows[:-1])
            if split:
                np.testing.assert_array_equal(np.diff(frame[rows]), 1)
            origin_row = before[rows[0]]
            expected = numbered.track[origin_row] if origin_row >= 0 else 0
            assert numbered.parent[number] == expected
