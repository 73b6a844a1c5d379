// Sliders made by ilora/sliders.py: one figure of each at a time. Without this script all of them are shown.
document.addEventListener("DOMContentLoaded", () => {
  for (const slider of document.querySelectorAll(".slider")) {
    const figures = slider.querySelectorAll("figure");
    const control = slider.querySelector(".slider-control");
    const input = control.querySelector("input");
    const show = () => {
      figures.forEach((figure, place) => { figure.hidden = place !== input.valueAsNumber; });
      const shown = figures[input.valueAsNumber];
      control.querySelector("output").textContent = shown.dataset.at;
      input.setAttribute("aria-valuetext", shown.querySelector("figcaption").textContent);
    };
    input.addEventListener("input", show);
    control.hidden = false;
    show();
  }
});
