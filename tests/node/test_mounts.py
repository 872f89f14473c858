"""The file system of a path, from the kernel's list of mounts."""

from pathlib import Path

import pytest
from node.trees import write

from knltrain.node.mounts import file_system, is_network

MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:40 / /data rw,relatime shared:1 - lustre 10.0.0.1@o2ib:/fs rw
31 30 0:41 / /data/local\040disk rw - xfs /dev/nvme0n1 rw
32 22 0:42 / /home rw - autofs systemd-1 rw
33 22 0:43 / /home rw - nfs4 server:/home rw
34 22 0:44 / /s3 rw - fuse.s3fs s3fs rw
damaged - line
35 22
"""


@pytest.mark.parametrize(
    "path, system, network",
    [
        ("/data/imagenet/train", "lustre", True),
        ("/data", "lustre", True),
        ("/data/local disk/imagenet", "xfs", False),
        ("/database", "ext4", False),
        ("/home/me", "nfs4", True),
        ("/s3/bucket", "fuse.s3fs", True),
    ],
)
def test_the_longest_mount_counts_and_the_last_of_equals(tmp_path, path, system, network):
    write(tmp_path, "proc/self/mountinfo", MOUNTS.strip("\n"))
    assert file_system(Path(path), tmp_path) == system
    assert is_network(system) == network


def test_without_a_list_nothing_is_known(tmp_path):
    assert file_system(Path("/data"), tmp_path) == ""
    assert not is_network("")
