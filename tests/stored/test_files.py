"""What is written is whole or not there; tensors are told apart, models named by names that tell nothing of the machine."""

import os
import signal
import stat
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nsvd.stored import files
from nsvd.stored.files import check_writable, fingerprint, replacing, short_name
from tests.tiny import file_limit, tiny_tokenizer

WAYS = ["in one step", "in two"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Folders change places in one step, or on a system that has not this step."""
    if request.param == "in two":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


def write(place: Path, text: str) -> None:
    """A folder of two files, one of them below another folder."""
    with replacing(place) as part:
        (part / "deep").mkdir(parents=True)
        for name in ("a", "deep/c"):
            (part / name).write_text(text + name, encoding="utf-8")


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text(encoding="utf-8") for f in folder.rglob("*") if f.is_file()}


def whole(text: str) -> dict[str, str]:
    return {f"out/{name}": text + name for name in ("a", "deep/c")}


def killed_at(step: int, work) -> bool:
    """Do ``work`` in a child that kills itself at the so-manieth call that Python reports; whether it came so far."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, _arguments) -> None:
            nonlocal left
            left -= event.startswith(("os.", "shutil.", "open", "tempfile.", "ctypes.", "fcntl."))
            if left < 0 and event != "os.kill":
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path, way):
    """Whole, after the next run at the latest, which leaves nothing behind; on Linux at once."""
    write(tmp_path / "out", "old ")
    step, seen = 0, set()
    while killed_at(step, lambda: write(tmp_path / "out", "new ")):
        if way == "in two" and not (tmp_path / "out").exists():
            seen.add("away")
            with pytest.raises(OSError, match="broken"), replacing(tmp_path / "out"):
                raise OSError("broken")
        found = {name: text for name, text in contents(tmp_path).items() if name.startswith("out/")}
        assert found in (whole("old "), whole("new "))
        seen.add(found["out/a"])
        write(tmp_path / "out", "old ")
        assert contents(tmp_path) == whole("old ")
        assert os.listdir(tmp_path) == ["out"]
        step += 1
    assert step > 20
    assert seen == {"old a", "new a"} | ({"away"} if way == "in two" else set())
    assert contents(tmp_path) == whole("new ")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_leaves_the_old_or_the_new_file(tmp_path):
    """So it is with a single file."""
    file, step = tmp_path / "out", 0

    def put(text: str) -> None:
        with replacing(file) as part:
            part.write_text(text, encoding="utf-8")

    put("old")
    while killed_at(step, lambda: put("new")):
        assert file.read_text(encoding="utf-8") in ("old", "new")
        put("old")
        assert os.listdir(tmp_path) == ["out"]
        step += 1
    assert step > 10
    assert file.read_text(encoding="utf-8") == "new"


def test_a_failed_exchange_puts_the_old_folder_back(tmp_path, monkeypatch):
    """Where it takes two steps, and the second fails."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write(tmp_path / "out", "old ")
    rename, tried = Path.rename, []

    def breaks(self, to):
        tried.append(to.name)
        if len(tried) == 2:
            raise OSError(5, "broken")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", breaks)
    with pytest.raises(OSError, match=r"cannot write .*out: broken"):
        write(tmp_path / "out", "new ")
    assert tried == ["old", "out", "out"]
    assert contents(tmp_path) == whole("old ")


def test_what_a_living_process_writes_is_not_taken_for_a_leftover(tmp_path):
    """Two write the same at the same time: the last one stands."""
    with replacing(tmp_path / "out") as slow:
        slow.write_text("slow", encoding="utf-8")
        with replacing(tmp_path / "out") as fast:
            fast.write_text("fast", encoding="utf-8")
        assert (tmp_path / "out").read_text(encoding="utf-8") == "fast"
    assert (tmp_path / "out").read_text(encoding="utf-8") == "slow"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_only_looks_like_a_leftover_stays(tmp_path):
    """Somebody's files are in it."""
    (tmp_path / ".out.12345678.part").mkdir()
    (tmp_path / ".out.12345678.part" / "notes").write_text("mine", encoding="utf-8")
    write(tmp_path / "out", "new ")
    assert contents(tmp_path) == whole("new ") | {".out.12345678.part/notes": "mine"}


def test_files_have_the_mode_of_new_files(tmp_path):
    """Whoever writes them; safetensors alone gives nobody else a look."""
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as part:
            save_file({"x": torch.zeros(2)}, part)
        with replacing(tmp_path / "folder") as part:
            part.mkdir()
            save_file({"x": torch.zeros(2)}, part / "file")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder/file")] == [0o640, 0o640]
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_pipe_is_written_into(tmp_path):
    """Its reader gets all; it is a pipe still. A folder does not go into it."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text(encoding="utf-8")))
    reader.start()
    check_writable(pipe)
    with replacing(pipe) as part:
        part.write_text("numbers", encoding="utf-8")
    reader.join()
    assert got == ["numbers"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(NotADirectoryError, match="pipe: it is a device or a pipe"):
        check_writable(pipe, folder=True)
    with pytest.raises(NotADirectoryError, match="pipe: it is a device or a pipe"):
        write(pipe, "x")


def test_a_device_stays_a_device(tmp_path):
    """Also for those who may remove it."""
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.open("wb").close()
    except OSError:
        pytest.skip("devices cannot be made or used here")
    check_writable(device)
    with replacing(device) as part:
        part.write_text("numbers", encoding="utf-8")
    assert stat.S_ISCHR(device.lstat().st_mode)


@pytest.mark.parametrize("target", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "out.txt"])
def test_a_redirected_output_gets_both(target, tmp_path, monkeypatch):
    """What is printed and what is written to the output by its name, in this order; it stays the file that the shell opened."""
    monkeypatch.chdir(tmp_path)
    with redirected(tmp_path / "out.txt"):
        print("table")
        check_writable(target)
        with replacing(target) as part:
            part.write_text("numbers\n", encoding="utf-8")
        print("end")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "table\nnumbers\nend\n"
    assert os.listdir(tmp_path) == ["out.txt"]


@contextmanager
def redirected(file: Path):
    """Standard output goes to a file, for Python and for the system, as with ``>``."""
    before, kept = sys.stdout, os.dup(1)
    try:
        with file.open("wb") as out:
            os.dup2(out.fileno(), 1)
        with open(1, "w", encoding="utf-8", closefd=False) as sys.stdout:
            yield
    finally:
        sys.stdout = before
        os.dup2(kept, 1)
        os.close(kept)


@pytest.mark.parametrize(
    "write",
    [
        lambda part: part.write_bytes(bytes(3000)),
        lambda part: save_file({"x": torch.zeros(3000)}, part),
        lambda part: tiny_tokenizer().save_pretrained(part),
    ],
)
def test_a_full_disk_is_one_sentence(write, tmp_path):
    """Whichever library writes, in whichever way it tells; nothing is left."""
    sentence = r"^cannot write .*target: File too large$"
    with file_limit(2000), pytest.raises(OSError, match=sentence), replacing(tmp_path / "target") as part:
        write(part)
    assert os.listdir(tmp_path) == []


def test_another_error_stays_what_it_is(tmp_path):
    """Of the block's own making, or of a file that it reads, which is named."""
    with pytest.raises(FloatingPointError, match=r"^loss$"), replacing(tmp_path / "x"):
        raise FloatingPointError("loss")
    with pytest.raises(FileNotFoundError, match=r"^no corpus$"), replacing(tmp_path / "x"):
        raise FileNotFoundError("no corpus")
    with (
        pytest.raises(FileNotFoundError, match=r"^cannot write .*x: No such file or directory: .*text$"),
        replacing(tmp_path / "x"),
    ):
        (tmp_path / "text").read_text()
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_told_before(tmp_path):
    """Below a file, over a folder, by too long a name, in a folder that takes none; nothing is made or left."""
    (tmp_path / "file").write_text("text", encoding="utf-8")
    for target, reason in (
        (tmp_path / "file" / "below", "file is not a writable folder"),
        (tmp_path, "there is a folder of that name"),
        (tmp_path / ("x" * 255), "File name too long"),
        ("/proc/self/new/file", "/proc/.* is not a writable folder"),
    ):
        with pytest.raises(OSError, match=f"cannot write .*{reason}"):
            check_writable(target)
    check_writable(tmp_path / "new" / "folder" / "file")
    check_writable(tmp_path, folder=True)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_a_fingerprint_changes_with_any_number(dtype):
    """Of any dtype; equal tensors have equal ones, contiguous or not."""
    tensors = [torch.arange(6).view(2, 3).to(dtype), torch.ones(2, dtype=dtype)]
    same, other = [tensors[0].T.clone().T, tensors[1]], [tensors[0].clone(), tensors[1].clone()]
    other[1][0] = 2
    assert fingerprint(tensors) == fingerprint(same)
    assert fingerprint(tensors) != fingerprint(other)
    assert len(fingerprint(tensors)) == 12


def test_a_model_in_a_folder_is_known_by_its_last_part(tmp_path, monkeypatch):
    """Also once it is gone, or is where we are; a hub id and an embedded name stay as they are."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert [short_name(name) for name in (folder, f"{folder}/", ".", tmp_path / "gone")] == 3 * ["my-model"] + ["gone"]
    assert [short_name(name) for name in ("meta-llama/Llama-2-7b-hf", "mini-llama")] == [
        "meta-llama/Llama-2-7b-hf",
        "mini-llama",
    ]


def test_a_single_number_has_a_fingerprint():
    """Parameters without dimensions are told apart like others."""
    one, other = torch.nn.Parameter(torch.tensor(1.0)), torch.tensor(2.0)
    assert fingerprint([one]) == fingerprint([torch.tensor(1.0)]) != fingerprint([other])


def test_a_way_through_a_folder_that_is_not_there_leads_to_what_is(tmp_path, monkeypatch):
    """``new/../old`` is ``old``: a device stays one, a folder is no place for a file."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    descriptor = os.open("pipe", os.O_RDWR | os.O_NONBLOCK)
    try:
        with replacing("new/../pipe") as part:
            part.write_text("told")
        assert os.read(descriptor, 9) == b"told"
        assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    finally:
        os.close(descriptor)
    os.mkdir("old")
    with pytest.raises(IsADirectoryError, match=r"cannot write new/\.\./old: there is a folder of that name"):
        check_writable("new/../old")
