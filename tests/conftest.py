"""Files that hold slow tests come first: where each core takes a file at a time, none is left alone with them in the end."""


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # a stable sort: else the order stays
