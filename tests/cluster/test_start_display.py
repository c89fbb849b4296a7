"""One bar for all ranks."""

from __future__ import annotations

from cluster.driver.start_display import StartDisplay


def test_one_bar_adds_up_what_all_ranks_load():
    display = StartDisplay(shown=False)
    display.progress(0, "too early", 1, 2)
    display.stage("starting workers")
    (task,) = display._bar.tasks
    assert (task.description, task.total) == ("starting workers", None)
    display.progress(0, "building the host store", 2**20, 4 * 2**20)
    display.progress(1, "building the host store", 0, 4 * 2**20)
    assert (task.completed, task.total) == (2**20, 8 * 2**20)
    assert task.description == "building the host store (2 ranks)"
    assert task.fields["amount"] == "1 MiB of 8 MiB"
    for bundle in (0, 1):
        display.progress(bundle, "building the host store", 4 * 2**20, 4 * 2**20)
    assert task.finished
    assert task.description == "ranks form a group"
    display.close()
    display.close()
    display.progress(0, "too late", 1, 2)
