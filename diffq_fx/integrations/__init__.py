"""Ways in and out for people whose code already speaks another library; none of them is imported by diffq_fx itself."""


def missing(package: str, error: ImportError) -> ImportError:
    """What to raise where a package that an integration is for cannot be imported: names the extra that brings it."""
    return ImportError(f"diffq_fx.integrations.{package} needs the package {package}: pip install 'diffq-fx[{package}]'. {error}")
