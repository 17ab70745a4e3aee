pytest_plugins = ["dsv4_hal.pytest_plugin"]
