from itertools import count

import pytest

from ldm.data.parallel_map import parallel_map


def test_results_come_parallel_map_and_few_are_made_ahead():
    taken = count()
    results = parallel_map(lambda number: number**2, taken, threads=2, ahead=5)
    assert [next(results) for _ in range(50)] == [(number, number**2) for number in range(50)]
    assert next(taken) <= 50 + 12
    results.close()
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda number: 1 // number, [2, 1, 0, 1], threads=2))
