// Before anything is painted: light, dark, or what the system prefers.
(function () {
  let chosen = "auto";
  try { chosen = localStorage.getItem("relay-theme") || "auto"; } catch { /* no storage: auto */ }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
