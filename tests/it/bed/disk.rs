//! Job: a disk of a test's own, that can be cut off from its power, or turn read-only as a failing one does.
//! Input: a size; a folder to lie under. Output: a mounted ext4 (root and loop devices are needed).
//! Always true: the mount is gone at the end, also after a panic.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// An ext4 in a file of its own, mounted.
pub struct Disk {
    image: PathBuf,
    pub mount: PathBuf,
    folder: Option<tempfile::TempDir>,
}

impl Disk {
    pub fn new(bytes: u64) -> Self {
        Self::unmounted(None).made(bytes)
    }

    /// Under a folder; what is in that is copied onto it.
    pub fn over(folder: &Path, bytes: u64) -> Self {
        let kept = folder.with_extension("kept");
        std::fs::rename(folder, &kept).unwrap();
        std::fs::create_dir(folder).unwrap();
        let disk = Self::unmounted(Some(folder)).made(bytes);
        std::fs::remove_dir(folder.join("lost+found")).unwrap();
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).unwrap();
        run("cp", &["-a", "--sparse=always", &format!("{}/.", kept.display()), &folder.to_string_lossy()]);
        run("sync", &["-f", &folder.to_string_lossy()]);
        disk
    }

    /// What a power cut now would leave.
    pub fn copy(&self) -> Self {
        let copy = Self::unmounted(None);
        run("cp", &["--sparse=always", &self.image.to_string_lossy(), &copy.image.to_string_lossy()]);
        copy.mounted()
    }

    /// Turns read-only under whoever writes, as an ext4 does that meets an error.
    pub fn fail(&self) {
        let output = Command::new("losetup").arg("-j").arg(&self.image).output().unwrap();
        let devices = String::from_utf8(output.stdout).unwrap();
        let device = devices.split(':').next().and_then(|path| path.strip_prefix("/dev/")).expect("its loop device");
        let trigger = format!("/sys/fs/ext4/{device}/trigger_fs_error");
        std::fs::write(&trigger, "a test's").unwrap_or_else(|e| panic!("{trigger}: {e}"));
    }

    /// What was written before it failed is there again, and can be written to; nobody may have files of it open.
    pub fn mend(&self) {
        run("umount", &[&self.mount.to_string_lossy()]);
        self.mount();
    }

    fn unmounted(over: Option<&Path>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let mount = over.map_or_else(|| folder.path().join("mount"), Path::to_owned);
        if over.is_none() {
            std::fs::create_dir(&mount).unwrap();
        }
        Self { image, mount, folder: Some(folder) }
    }

    fn made(self, bytes: u64) -> Self {
        std::fs::File::create(&self.image).unwrap().set_len(bytes).unwrap();
        run("mkfs.ext4", &["-q", "-F", &self.image.to_string_lossy()]);
        self.mounted()
    }

    fn mounted(self) -> Self {
        self.mount();
        self
    }

    /// ext4 commits by itself each 5 s; not here, or a copy could catch it in the middle.
    fn mount(&self) {
        let (image, mount) = (self.image.to_string_lossy(), self.mount.to_string_lossy());
        run("mount", &["-o", "loop,commit=300,errors=remount-ro", &image, &mount]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily, because a writer that panicked may still have files open; the loop device goes with the mount.
        let _ = Command::new("umount").arg("-l").arg(&self.mount).stderr(Stdio::null()).status();
        drop(self.folder.take());
    }
}

/// Runs a tool of Debian's, which must succeed.
pub fn run(program: &str, arguments: &[&str]) {
    let needs = "this test needs root, loop devices, and Debian's packages mount, e2fsprogs and coreutils";
    match Command::new(program).args(arguments).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("{program}: {}\n{needs}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("{program}: {error}\n{needs}"),
    }
}
