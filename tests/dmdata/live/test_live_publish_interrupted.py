"""Publications to the real bucket that are killed, interrupted or overtaken: the next one sends what is missing."""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import Child

from dmdata.catalog.entries import Catalog
from dmdata.errors import SourceError
from dmdata.objects import uploads
from dmpipeline.errors import VerificationError
from dmpipeline.exporting.export import publish_run
from dmpipeline.runs.rows import block_digest
from dmpipeline.runs.store import Run
from dmpipeline.spec import RunSpec

ARRAYS = RunSpec().arrays

pytestmark = pytest.mark.live

PART = 5 << 20
PREFIXES = itertools.count()

PROGRAM = """
import json, pathlib, re, sys
from dmdata.objects import uploads
from dmpipeline.exporting.export import publish_run
from dmpipeline.runs.store import Run

def most_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

uploads.PART_BYTES = int(sys.argv[3])
run = Run.open(sys.argv[1])
with uploads.Uploads(sys.argv[2]) as place:
    place.read("nothing")
run.read_block(run.spec.blocks[0])
run.dataset()  # brings scikit-learn along
before = most_bytes()
files = publish_run(run, sys.argv[2], progress=lambda done, n_rows: print(done, flush=True))
print(json.dumps({"sent": sum(file.sent_bytes for file in files), "grown_bytes": most_bytes() - before}))
"""


def filled_run(path, n_models, *, draw=0, **changes):
    """Make a run whose outputs are noise, which takes no training: 41 kB a model."""
    spec = RunSpec(n_models=n_models, held_out={"n_subsets": 0}, recipe={"hidden": 4, "epochs": 1}, block_models=40)
    run = Run.create(path, spec.model_copy(update=changes))
    noise = np.random.default_rng(draw)
    for block, rows in enumerate(run.spec.blocks):
        shapes = {name: (len(rows), *run.array(name).shape[1:]) for name in ARRAYS}
        data = {name: noise.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
        data["train_masks"] = data["train_masks"] > 0
        for name in ARRAYS:
            run.array(name)[rows.start : rows.stop] = data[name]
        run.array("block_digests")[block] = np.frombuffer(block_digest(data), np.uint8)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return filled_run(tmp_path_factory.mktemp("filled") / "run", 1200)


@pytest.fixture
def bucket(live_s3, monkeypatch):
    """An own prefix, the owner's environment, and parts as small as S3 takes."""
    for name, value in live_s3.owner_env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(uploads, "PART_BYTES", PART)
    return Bucket(live_s3, f"interrupted-{os.getpid()}-{next(PREFIXES)}")


class Bucket:
    def __init__(self, live_s3, prefix):
        self._client, self._bucket, self._prefix = live_s3.owner, live_s3.bucket, prefix
        self.url = f"s3://{live_s3.bucket}/{prefix}"

    def objects(self):
        listed = self._client.list_objects_v2(Bucket=self._bucket, Prefix=f"{self._prefix}/").get("Contents", [])
        return {item["Key"].removeprefix(f"{self._prefix}/"): self.read(item["Key"]) for item in listed}

    def read(self, key):
        return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()

    def catalog(self):
        return Catalog.parse(self.read(f"{self._prefix}/catalog.yaml").decode(), origin=f"{self.url}/catalog.yaml")

    def unfinished(self):
        """Sizes of the parts of each unfinished upload."""
        listed = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=f"{self._prefix}/")
        return [
            [part["Size"] for part in self._client.list_parts(Bucket=self._bucket, **upload).get("Parts", [])]
            for upload in ({name: found[name] for name in ("Key", "UploadId")} for found in listed.get("Uploads", []))
        ]

    def begin(self, key):
        where = {"Bucket": self._bucket, "Key": f"{self._prefix}/{key}"}
        upload_id = self._client.create_multipart_upload(**where)["UploadId"]
        self._client.upload_part(**where, UploadId=upload_id, PartNumber=1, Body=b"x" * (PART + 1))

    def holds(self, run):
        """Tell whether the bucket has just this run's files, and a catalog with their digests."""
        there, catalog = self.objects(), self.catalog()
        alpha = run.spec.alpha_name
        for name in ARRAYS:
            saved = io.BytesIO()
            np.save(saved, run.array(name)[:])
            found = catalog.find(f"digits/{alpha}/{name}").stored
            same = there[f"digits/data/{name}_{alpha}.npy"] == saved.getvalue()
            if not same or found.sha256 != hashlib.sha256(saved.getvalue()).hexdigest():
                return False
        return True


def start(run, url, part=PART):
    return Child(
        [sys.executable, "-c", PROGRAM, run.path, url, str(part)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def end(child):
    out, said = child.communicate()
    assert child.returncode == 0, said.decode()
    return json.loads(out.splitlines()[-1])


def total_bytes(run):
    return sum(run.array(name).nbytes + 128 for name in ARRAYS)


def test_a_publication_killed_again_and_again_ends_with_the_very_bytes_and_sends_no_part_twice(run, bucket):
    moments = np.random.default_rng(0)
    for _ in range(3):
        child = start(run, bucket.url)
        for _ in range(moments.integers(5, 31)):
            child.stdout.readline()
        time.sleep(moments.random() * 0.2)
        child.kill()
        child.communicate()
    there = sum(map(sum, bucket.unfinished()))
    done = [content for key, content in bucket.objects().items() if key != "catalog.yaml"]
    said = end(start(run, bucket.url))
    assert there or done
    assert said["sent"] == total_bytes(run) - there - sum(map(len, done))
    assert bucket.holds(run)
    assert bucket.unfinished() == []


def test_ctrl_c_ends_a_publication_at_once_and_the_next_goes_on(run, bucket):
    child = start(run, bucket.url)
    for _ in range(25):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    child.communicate()
    there = sum(map(sum, bucket.unfinished()))
    assert 0 < there < total_bytes(run)
    assert "catalog.yaml" not in bucket.objects()
    assert end(start(run, bucket.url))["sent"] == total_bytes(run) - there
    assert bucket.holds(run)
    assert bucket.unfinished() == []


def test_what_is_there_already_is_not_sent_again(run, bucket):
    publish_run(run, bucket.url)
    again = publish_run(run, bucket.url)
    assert [file.sent_bytes for file in again] == [0] * len(ARRAYS)
    assert all(file.replaced for file in again)
    assert bucket.holds(run)


def test_what_is_kept_gets_the_acl_that_is_asked_for(run, bucket, live_s3):
    key = f"{bucket.url.rpartition('/')[2]}/digits/data/test_logits_50pct.npy"
    for acl, n_grants in ((None, 1), ("authenticated-read", 2), (None, 1)):
        publish_run(run, bucket.url, acl=acl)
        assert len(live_s3.owner.get_object_acl(Bucket=live_s3.bucket, Key=key)["Grants"]) == n_grants


@pytest.mark.parametrize("changes", [{"n_models": 1200, "draw": 1}, {"n_models": 1600, "draw": 0}])
def test_another_run_in_place_of_one_that_was_killed_takes_no_part_of_it(run, bucket, tmp_path, changes):
    child = start(run, bucket.url)
    for _ in range(30):
        child.stdout.readline()
    child.kill()
    child.communicate()
    assert bucket.unfinished()
    other = filled_run(tmp_path / "other", **changes)
    publish_run(other, bucket.url)
    assert bucket.holds(other)
    assert bucket.unfinished() == []
    publish_run(run, bucket.url)
    assert bucket.holds(run)


def test_until_all_of_another_run_has_arrived_the_earlier_one_can_be_read(run, bucket, tmp_path):
    publish_run(run, bucket.url)
    other = filled_run(tmp_path / "other", 1240, draw=1)
    other.array("test_margins")[1239, 0] = np.float16(7)  # found out when nearly all of it is sent
    with pytest.raises(VerificationError, match=r"what was sent waits in s3://.* the same command resumes from there"):
        publish_run(other, bucket.url)
    assert bucket.unfinished()
    assert bucket.holds(run)


def test_leftovers_of_this_alpha_are_aborted_and_those_of_others_are_not(run, bucket):
    ours = ("digits/data/test_logits_50pct.npy", "digits/data/unknown_50pct.npy", "digits/datamodels/test_50pct.pt")
    for key in (*ours, "digits/data/test_logits_75pct.npy", "elsewhere/data/test_logits_50pct.npy"):
        bucket.begin(key)
    publish_run(run, bucket.url)
    assert len(bucket.unfinished()) == 2
    assert bucket.holds(run)


def test_an_upload_that_somebody_else_ends_is_said_to_be(run, bucket, live_s3):
    def abort_all(done, _):
        if done == 800:
            listed = live_s3.owner.list_multipart_uploads(Bucket=live_s3.bucket)
            for upload in listed.get("Uploads", []):
                where = {"Bucket": live_s3.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                live_s3.owner.abort_multipart_upload(**where)

    with pytest.raises(SourceError, match="ended by somebody else"):
        publish_run(run, bucket.url, progress=abort_all)
    publish_run(run, bucket.url)
    assert bucket.holds(run)


def test_two_alphas_in_one_bucket_are_read_through_one_catalog(run, bucket, tmp_path):
    other = filled_run(tmp_path / "other", 80, alpha=0.75)
    publish_run(run, bucket.url)
    files = publish_run(other, bucket.url)
    assert not any(file.replaced for file in files)
    assert bucket.holds(run)
    assert bucket.holds(other)


def test_memory_does_not_grow_with_the_run(bucket, tmp_path, figures):
    run = filled_run(tmp_path / "large", 4800)
    said = end(start(run, bucket.url))
    assert said["sent"] == total_bytes(run) > 190e6
    figures.append(f"publishing {said['sent'] / 1e6:.0f} MB: memory grew by {said['grown_bytes'] / 1e6:.0f} MB")
    # a part of each of five files and four that are sent, as much that the allocator keeps, and a block of 2 MB
    assert said["grown_bytes"] < 2 * 9 * PART + 25e6
