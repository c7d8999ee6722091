"""Running a read plan under a budget: concurrent ranges, retries, remembered headers, the cache of paid ranges."""
