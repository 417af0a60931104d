"""What memory is left, by the machine, its container and the limit of the process."""

import resource

from gspn_jax import machine


def test_what_is_free_is_what_the_machine_and_the_container_leave(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemFree: 3 kB\nMemAvailable:    50 kB\n")
    assert machine._of_machine(tmp_path / "meminfo") == 51_200 and machine._of_machine(tmp_path / "none") is None
    monkeypatch.setattr(machine, "_of_machine", lambda: 5)
    monkeypatch.setattr(machine, "_of_container", lambda: 4)
    assert machine.free_memory() == 4


def test_the_limit_of_the_process_counts(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("Name: a\nVmData:\t     100 kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1_000_000, 2_000_000))
    assert machine._of_process(tmp_path / "status") == 1_000_000 - 102_400
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert machine._of_process(tmp_path / "status") is None
