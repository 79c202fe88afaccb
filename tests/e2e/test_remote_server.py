# SPDX-License-Identifier: BSD-3-Clause
"""
What the remote's server may be or answer: errors, too small, read-only, no NBD at all.

Each is a state with a reason that names the cause; none is an error for a client, a
failed start, or a byte written where it may not be.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable

import pytest
import support
from e2e.lib.harness import MIB, Site

Sites = Callable[..., Site]


@pytest.mark.parametrize(
    ("error", "words"), [("EIO", "Input/output error"), ("ENOSPC", "No space left")]
)
def test_remote_write_error_is_said_and_heals(
    site: Site, error: str, words: str
) -> None:
    """A remote that answers writes with errors is out of sync, retried, and heals."""
    switch = site.folder / "errors"
    words_of_nbdkit = [f"error-pwrite={error}", "error-pwrite-rate=1"]
    site.dr.start("--filter=error", *words_of_nbdkit, f"error-file={switch}")
    site.create()
    site.serve()
    site.wait_in_sync()
    load = site.load()
    load.wait_for(50)
    switch.touch()
    lost = site.wait_remote(
        lambda one: one["state"] == "out_of_sync" and words in one["last_error"],
        "the error to be told",
    )
    assert "answered" in lost["reason"]
    assert words in lost["reason"]
    load.wait_for(load.count + 20, "writes while it refuses")
    site.assert_covered()
    # Its resync is refused as well: it must be retried less and less often.
    support.wait_until(
        lambda: site.log.count("resync_interrupted") >= 2, "resync to be tried again"
    )
    switch.unlink()
    site.tell("resume")
    site.wait_in_sync()
    load.stop()
    assert load.errors == []
    site.stop()
    site.assert_equal()


def test_remote_flush_error_is_said_and_heals(new_site: Sites) -> None:
    """A flush the remote refuses is no error for the client; its regions are dirty."""
    site = new_site(size=MIB)
    switch = site.folder / "errors"
    # nbdkit's error filter knows no flush.
    image = site.dr.image
    site.dr.start_eval(
        "thread_model=echo parallel",
        f"get_size=echo {MIB}",
        f"pread=dd if={image} iflag=skip_bytes,count_bytes skip=$4 count=$3",
        f"pwrite=dd of={image} oflag=seek_bytes seek=$4 conv=notrunc",
        f"flush=if [ -e {switch} ]; then echo EIO dying >&2; exit 1; fi",
        "can_write=exit 0",
        "can_flush=exit 0",
    )
    site.create()
    site.serve()
    site.wait_in_sync()
    handle = site.client()
    handle.pwrite(b"a" * 3 * site.region_size, 0)
    switch.touch()
    handle.flush()
    lost = site.wait_remote(
        lambda one: "flush" in one["last_error"] and one["state"] == "out_of_sync",
        "the error to be told",
    )
    assert lost["dirty_bytes"] >= 3 * site.region_size
    switch.unlink()
    site.tell("resume")
    site.wait_in_sync()
    handle.shutdown()
    site.stop()
    site.assert_equal()


def test_remote_smaller_is_refused_with_both_sizes(site: Site) -> None:
    """A remote that is too small is not written to, and both sizes are said."""
    with site.dr.image.open("r+b") as file:
        file.truncate(site.size - 512)
    site.dr.start()
    site.create()
    site.serve()
    found = site.wait_remote(lambda one: "small" in one["reason"], "the refusal")
    assert found["state"] == "out_of_sync"
    assert str(site.size) in found["reason"]
    assert str(site.size - 512) in found["reason"]


def test_remote_larger_is_fine(site: Site) -> None:
    """A remote that is larger is used, its rest is not touched."""
    with site.dr.image.open("r+b") as file:
        file.truncate(site.size + MIB)
    site.fill(site.dr.image, MIB, offset=site.size)
    rest = site.dr.image.read_bytes()[site.size :]
    site.fill(site.local, site.size)
    site.bring_up()
    site.stop()
    site.assert_equal()
    assert rest == site.dr.image.read_bytes()[site.size :]


def test_remote_read_only_is_refused(site: Site) -> None:
    """A remote that exports read-only is refused with that reason."""
    site.dr.start("-r")
    site.create()
    site.serve()
    found = site.wait_remote(lambda one: "read-only" in one["reason"], "the refusal")
    assert found["state"] == "out_of_sync"


def test_remote_no_nbd_server_is_said_and_start_succeeds(site: Site, door: str) -> None:
    """Something else on the remote's port is a reason, not a failed start."""
    with socketserver.TCPServer(("127.0.0.1", 0), Greeter) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        site.dr.uri = f"nbd://127.0.0.1:{server.server_address[1]}/disk"
        site.write_config()
        site.create()
        site.serve(door)
        found = site.wait_remote(lambda one: one["last_error"], "the reason")
        assert found["state"] == "out_of_sync"
        assert "127.0.0.1" in found["reason"]
        handle = site.client()
        handle.pwrite(b"a" * 512, 0)
        handle.shutdown()
        site.stop()
        server.shutdown()
        thread.join()


class Greeter(socketserver.BaseRequestHandler):
    """Speaks first, as an NBD server does, but SSH."""

    def handle(self) -> None:
        """Send a line that is no NBD greeting, and hang up."""
        self.request.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" * 4)


def test_remote_silent_server_is_bounded(site: Site) -> None:
    """A port that takes connections and says nothing is out of sync with a reason."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        site.dr.uri = f"nbd://127.0.0.1:{server.getsockname()[1]}/disk"
        site.deadline = "500ms"
        site.write_config()
        site.create()
        site.serve()
        found = site.wait_remote(lambda one: one["last_error"], "the reason")
        assert found["state"] == "out_of_sync"
        handle = site.client()
        handle.pwrite(b"a" * 512, 0)
        handle.shutdown()
        site.stop()


def test_remote_unreachable_at_start_connects_when_it_comes(
    site: Site, door: str
) -> None:
    """A remote that is not there at start is out of sync, and used once it comes."""
    site.create()
    site.serve(door)
    found = site.wait_remote(
        lambda one: one["last_error"] and one["state"] == "out_of_sync", "the reason"
    )
    assert str(site.dr.socket) in found["reason"]
    assert "next attempt in" in found["reason"] or "trying" in found["reason"]
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    handle.shutdown()
    site.dr.start()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()


def test_remote_in_sync_unreachable_at_start_holds_then_serves(site: Site) -> None:
    """In sync when left and not there at start: after the hold, writes are answered."""
    site.bring_up()
    site.stop()
    site.dr.kill()
    site.serve()
    handle = site.client()
    handle.pwrite(b"a" * 4096, 0)
    lost = site.wait_state("out_of_sync")
    assert lost["dirty_bytes"] == site.region_size
    handle.shutdown()
    site.dr.start()
    site.wait_in_sync()
    site.stop()
    site.assert_equal()
