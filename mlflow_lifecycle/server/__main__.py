"""Start the server: ``python -I FOLDER/server settings.json``."""

import sys
import types
from pathlib import Path

# The model's own environment does not have mlflow_lifecycle. This folder becomes a package, and
# leaves sys.path, so that none of its modules hides one that the model imports.
package = types.ModuleType("model_server")
package.__path__ = [sys.path.pop(0)]
sys.modules[package.__name__] = package

if __name__ == "__main__":
    from model_server.app import main

    main(Path(sys.argv[1]))
