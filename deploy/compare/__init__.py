"""``carryover compare``: variations of one settings file, each over the same seeds, in one table and one figure."""
