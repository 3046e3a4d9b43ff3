"""Teacher states that are computed once: in memory, or on disk for many runs and students."""

from sra.teacher_cache.cache import DiskCache, TeacherCache, check_caches
from sra.teacher_cache.writer import CacheWriter, teacher_sequences

__all__ = ["CacheWriter", "DiskCache", "TeacherCache", "check_caches", "teacher_sequences"]
