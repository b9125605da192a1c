"""Memory in huge pages."""

from timemix.runtime.machine import huge_pages, resident_memory


def test_huge_pages_are_memory_of_zeros_that_takes_space_only_when_written():
    before = resident_memory()
    memory = huge_pages(2**28)
    assert memory.shape == (2**28,)
    memory[:100] = 7
    assert resident_memory() - before < 2**24
    assert memory[:101].tolist() == [7] * 100 + [0]
    assert not memory[-(2**16) :].any()
