#!/usr/bin/env python3
"""Reads a folder of event files with the real tensorboard and prints its tags and values as JSON.

Usage: tensorboard_read.py FOLDER [TAG ...]; exit code 1 when a TAG is missing. Needs the Python package tensorboard.
"""
import json, sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read(folder):
    """Scalars as {tag: [[step, value], ...]}, and the tags of texts and other tensors."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in tags["scalars"]}
    plugins = {tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in events.summary_metadata}
    return {"scalars": scalars, "tensors": tags["tensors"], "plugins": plugins}


if __name__ == "__main__":
    found = read(sys.argv[1])
    print(json.dumps(found))
    missing = set(sys.argv[2:]) - set(found["scalars"]) - set(found["tensors"])
    sys.exit(f"not there: {', '.join(sorted(missing))}" if missing else 0)
